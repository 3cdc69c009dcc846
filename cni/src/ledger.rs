//! Who has which address: the changes that ADD, DEL and GC make to a network's state. Pure; the
//! time is an argument.
//!
//! No address belongs to two attachments, and one that was given back rests for [`HOLD_DOWN`], so
//! that nobody who still means its former pod reaches another.

use std::{collections::HashSet, net::IpAddr, time::Duration};

use ipnetwork::IpNetwork;

use crate::{
    error::Failure,
    names,
    pool::Pool,
    state::{Attachment, AttachmentKey, Bandwidth, HostPort, Pod, Released, State},
};

/// How long an address rests after it was given back.
pub const HOLD_DOWN: Duration = Duration::from_secs(10);

/// Milliseconds since 1970.
pub type Now = u64;

/// What an attachment is to be, but for its addresses.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Whose it is.
    pub pod: Option<Pod>,
    /// Ports of the node that lead to it.
    pub host_ports: Vec<HostPort>,
    /// How fast it may be.
    pub bandwidth: Option<Bandwidth>,
    /// Addresses that it has to get.
    pub ips: Vec<IpAddr>,
    /// The states of the node's other networks, whose addresses are of the same ranges.
    pub others: Vec<State>,
}

/// Whether an address still rests. A clock that was set back does not make it rest for longer.
fn rests(released: &Released, now: Now) -> bool {
    u128::from(now.abs_diff(released.at_ms)) < HOLD_DOWN.as_millis()
}

impl State {
    /// Gives an attachment one address of each of `ranges`: those that it has, those that it wants,
    /// or the next. Nothing changes if that is impossible.
    pub fn reserve(
        &mut self,
        key: &AttachmentKey,
        ranges: &[IpNetwork],
        wanted: Wanted,
        now: Now,
    ) -> Result<Attachment, Failure> {
        let interface = names::interface(key);
        let has_name = |other: &&Attachment| other.interface == interface && other.key != *key;
        if let Some(other) = self.attachments.iter().find(has_name) {
            return Err(Failure::environment(
                "CNI_CONTAINERID",
                format!(
                    "would give the same interface {interface} as container {}; start the \
                     container under another id",
                    other.key.container
                ),
            ));
        }
        self.released.retain(|released| rests(released, now));
        let ips = self.choose(key, ranges, &wanted, now)?;
        let attachment = Attachment {
            interface,
            mac: names::container_mac(key),
            host_mac: names::host_mac(key),
            key: key.clone(),
            ips,
            pod: wanted.pod,
            host_ports: wanted.host_ports,
            bandwidth: wanted.bandwidth,
        };
        if self.attachment(key) == Some(&attachment) {
            return Ok(attachment);
        }
        let had = self.give_back(|other| other == key, |ip| attachment.ips.contains(&ip), now);
        let had: Vec<IpAddr> = had.into_iter().flat_map(|gone| gone.ips).collect();
        // Only what came in turn moves on whose turn it is.
        for ip in &attachment.ips {
            if !had.contains(ip) && !wanted.ips.contains(ip) {
                *self.cursor(ip.is_ipv4()) = Some(*ip);
            }
        }
        self.attachments.push(attachment.clone());
        Ok(attachment)
    }

    /// One address of each range.
    fn choose(
        &self,
        key: &AttachmentKey,
        ranges: &[IpNetwork],
        wanted: &Wanted,
        now: Now,
    ) -> Result<Vec<IpAddr>, Failure> {
        let states = || std::iter::once(self).chain(&wanted.others);
        let wanted = &wanted.ips;
        let attachments = states().flat_map(|state| &state.attachments);
        let others = attachments.filter(|other| other.key != *key);
        let taken: HashSet<IpAddr> = others.flat_map(|other| other.ips.iter().copied()).collect();
        let released = states().flat_map(|state| &state.released);
        let released = released.filter(|released| rests(released, now));
        let resting: HashSet<IpAddr> = released.map(|found| found.address).collect();
        let own = self
            .attachment(key)
            .map_or(&[][..], |own| own.ips.as_slice());
        let pools = ranges.iter().map(|range| {
            Pool::new(*range).ok_or_else(|| Failure::Exhausted {
                range: range.to_string(),
                capacity: 0,
            })
        });
        let pools: Vec<Pool> = pools.collect::<Result<_, _>>()?;
        if let Some(stray) = wanted
            .iter()
            .find(|ip| !pools.iter().any(|pool| pool.contains(**ip)))
        {
            let ranges: Vec<String> = ranges.iter().map(IpNetwork::to_string).collect();
            return Err(Failure::Address {
                address: *stray,
                reason: format!(
                    "is not one that a pod on this node can have; ask for one of {}",
                    ranges.join(" or ")
                ),
            });
        }
        let one = |pool: &Pool| {
            let mut asked = wanted.iter().filter(|ip| pool.contains(**ip));
            match (asked.next(), asked.next()) {
                (Some(ip), None) => match (taken.contains(ip), resting.contains(ip)) {
                    (true, _) => Err(Failure::Address {
                        address: *ip,
                        reason: "belongs to another pod; ask for another, or for none".to_owned(),
                    }),
                    (_, true) => Err(Failure::TryAgain(format!(
                        "{ip} was given back less than {} s ago; ask again then",
                        HOLD_DOWN.as_secs()
                    ))),
                    _ => Ok(*ip),
                },
                (Some(_), Some(second)) => Err(Failure::Address {
                    address: *second,
                    reason: format!("is a second one of {}; ask for one", pool.range()),
                }),
                (None, _) => {
                    let cursors = self.cursors;
                    let cursor = if pool.range().is_ipv4() {
                        cursors.v4
                    } else {
                        cursors.v6
                    };
                    next(pool, own, cursor, &taken, &resting)
                }
            }
        };
        pools.iter().map(one).collect()
    }

    fn cursor(&mut self, is_ipv4: bool) -> &mut Option<IpAddr> {
        if is_ipv4 {
            &mut self.cursors.v4
        } else {
            &mut self.cursors.v6
        }
    }

    /// Takes an attachment away. Its addresses rest, unless they were never used. Whether it was
    /// there.
    pub fn release(&mut self, key: &AttachmentKey, was_used: bool, now: Now) -> bool {
        !self
            .give_back(|other| other == key, |_| !was_used, now)
            .is_empty()
    }

    /// Takes all attachments away but these; how many there were.
    pub fn release_all_but(&mut self, valid: &HashSet<&AttachmentKey>, now: Now) -> usize {
        self.give_back(|key| !valid.contains(key), |_| false, now)
            .len()
    }

    fn give_back(
        &mut self,
        is_gone: impl Fn(&AttachmentKey) -> bool,
        is_kept: impl Fn(IpAddr) -> bool,
        now: Now,
    ) -> Vec<Attachment> {
        self.released.retain(|released| rests(released, now));
        let gone: Vec<Attachment> = self
            .attachments
            .extract_if(.., |found| is_gone(&found.key))
            .collect();
        let ips = gone.iter().flat_map(|found| found.ips.iter().copied());
        self.released
            .extend(ips.filter(|ip| !is_kept(*ip)).map(|address| Released {
                address,
                at_ms: now,
            }));
        gone
    }
}

/// The attachment's own address, or the next that is free.
fn next(
    pool: &Pool,
    own: &[IpAddr],
    cursor: Option<IpAddr>,
    taken: &HashSet<IpAddr>,
    resting: &HashSet<IpAddr>,
) -> Result<IpAddr, Failure> {
    if let Some(own) = own.iter().find(|ip| pool.contains(**ip)) {
        return Ok(*own);
    }
    if let Some(ip) = pool.next(cursor, |ip| taken.contains(&ip) || resting.contains(&ip)) {
        return Ok(ip);
    }
    if pool.next(cursor, |ip| taken.contains(&ip)).is_some() {
        return Err(Failure::TryAgain(format!(
            "every free address of {} was given back less than {} s ago",
            pool.range(),
            HOLD_DOWN.as_secs()
        )));
    }
    Err(Failure::Exhausted {
        range: pool.range().to_string(),
        capacity: pool.capacity(),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn key(number: u8) -> AttachmentKey {
        AttachmentKey {
            container: format!("c{number}"),
            ifname: "eth0".to_owned(),
        }
    }

    fn ranges(four: &str) -> Vec<IpNetwork> {
        vec![four.parse().unwrap(), "fd00:244:1::/64".parse().unwrap()]
    }

    #[test]
    fn addresses_rest_before_they_come_back() {
        let ranges = ranges("10.0.0.0/29");
        let mut state = State::new("net");
        let add = |state: &mut State, number: u8, now| {
            state.reserve(&key(number), &ranges, Wanted::default(), now)
        };
        for number in 0..5 {
            add(&mut state, number, 0).unwrap();
        }
        assert_eq!(add(&mut state, 9, 0).unwrap_err().code(), 100);
        let had = state.attachment(&key(3)).unwrap().ips.clone();
        assert!(state.release(&key(3), true, 1_000));
        assert!(!state.release(&key(3), true, 1_000));
        assert_eq!(add(&mut state, 9, 10_999).unwrap_err().code(), 11);
        assert_eq!(add(&mut state, 9, 11_000).unwrap().ips.first(), had.first());
        // What was never used need not rest.
        assert!(state.release(&key(9), false, 12_000));
        add(&mut state, 8, 12_000).unwrap();
    }

    #[test]
    fn the_same_attachment_keeps_its_addresses() {
        let mut state = State::new("net");
        let first = state
            .reserve(&key(1), &ranges("10.0.0.0/24"), Wanted::default(), 0)
            .unwrap();
        let again = state
            .reserve(&key(1), &ranges("10.0.0.0/24"), Wanted::default(), 1)
            .unwrap();
        assert_eq!(first, again);
        state
            .reserve(&key(2), &ranges("10.0.0.0/24"), Wanted::default(), 1)
            .unwrap();
        let before = state.clone();
        state
            .reserve(&key(1), &ranges("10.0.0.0/24"), Wanted::default(), 1)
            .unwrap();
        assert_eq!(state, before, "neither the order nor whose turn it is");
        state.release(&key(2), false, 1);
        assert_eq!(state.attachments.len(), 1);
        assert!(state.released.is_empty());
        // Another range: another address, and the former one is not lost.
        let moved = state
            .reserve(&key(1), &ranges("10.9.0.0/24"), Wanted::default(), 2)
            .unwrap();
        assert_eq!(moved.ips.get(1), first.ips.get(1));
        assert_eq!(state.released.len(), 1);
    }

    #[test]
    fn addresses_that_are_asked_for_are_had_or_refused() {
        let mut state = State::new("net");
        let mut ask = |number, ips: &[&str], now| {
            let wanted = Wanted {
                ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
                ..Wanted::default()
            };
            state.reserve(&key(number), &ranges("10.0.0.0/24"), wanted, now)
        };
        let had = ask(1, &["10.0.0.77"], 0).unwrap();
        assert_eq!(had.ips.first().unwrap().to_string(), "10.0.0.77");
        assert_eq!(ask(2, &["10.0.0.77"], 0).unwrap_err().code(), 103);
        assert_eq!(ask(2, &["10.0.1.77"], 0).unwrap_err().code(), 103);
        assert_eq!(ask(2, &["10.0.0.1"], 0).unwrap_err().code(), 103);
        assert_eq!(
            ask(2, &["10.0.0.5", "10.0.0.6"], 0).unwrap_err().code(),
            103
        );
        ask(1, &["10.0.0.78"], 0).unwrap();
        assert_eq!(ask(2, &["10.0.0.77"], 9_999).unwrap_err().code(), 11);
        ask(2, &["10.0.0.77"], 10_000).unwrap();
    }

    #[derive(Clone, Debug)]
    enum Step {
        Add(u8),
        Delete(u8),
        Keep(Vec<u8>),
        Wait(u16),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..20_u8).prop_map(Step::Add),
            3 => (0..20_u8).prop_map(Step::Delete),
            1 => prop::collection::vec(0..20_u8, 0..20).prop_map(Step::Keep),
            2 => (0..20_000_u16).prop_map(Step::Wait),
        ]
    }

    proptest! {
        #[test]
        fn no_address_is_ever_anothers_or_comes_back_too_soon(
            steps in prop::collection::vec(step(), 0..200),
            prefix in 27_u8..=30,
        ) {
            let ranges = ranges(&format!("10.0.0.0/{prefix}"));
            let capacity = Pool::new(*ranges.first().unwrap()).unwrap().capacity() as usize;
            let mut state = State::new("net");
            let mut now = 1_000_000;
            let mut given_back: HashMap<IpAddr, Now> = HashMap::new();
            for step in steps {
                let before = state.clone();
                match step {
                    Step::Add(number) => {
                        let existed = state.attachment(&key(number)).cloned();
                        match state.reserve(&key(number), &ranges, Wanted::default(), now) {
                            Ok(got) => {
                                prop_assert_eq!(got.ips.len(), 2);
                                if let Some(existed) = existed {
                                    prop_assert_eq!(existed, got);
                                } else {
                                    for ip in &got.ips {
                                        prop_assert!(given_back.get(ip).is_none_or(|at| now - at >= 10_000));
                                    }
                                }
                            }
                            Err(Failure::Exhausted { .. }) => {
                                prop_assert_eq!(state.attachments.len(), capacity);
                            }
                            Err(Failure::TryAgain(_)) => {
                                prop_assert!(state.attachments.len() < capacity);
                                prop_assert!(!state.released.is_empty());
                            }
                            Err(other) => return Err(TestCaseError::fail(other.to_string())),
                        }
                    }
                    Step::Delete(number) => {
                        let was_there = state.attachment(&key(number)).is_some();
                        prop_assert_eq!(state.release(&key(number), true, now), was_there);
                    }
                    Step::Keep(numbers) => {
                        let keys: Vec<AttachmentKey> = numbers.into_iter().map(key).collect();
                        state.release_all_but(&keys.iter().collect(), now);
                        prop_assert!(state.attachments.iter().all(|found| keys.contains(&found.key)));
                    }
                    Step::Wait(time) => now += u64::from(time),
                }
                for gone in before.attachments.iter().filter(|gone| state.attachment(&gone.key).is_none()) {
                    given_back.extend(gone.ips.iter().map(|ip| (*ip, now)));
                }
                let ips: Vec<&IpAddr> = state.attachments.iter().flat_map(|found| &found.ips).collect();
                prop_assert_eq!(ips.iter().collect::<HashSet<_>>().len(), ips.len());
            }
        }
    }
}
