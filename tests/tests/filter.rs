//! What the agent tells programs not to look up, in the real maps.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::{
    collections::{BTreeSet, HashMap},
    os::fd::AsFd,
    path::Path,
};

use anyhow::Result;
use aya::maps::{Array, Map, MapData};
use penstock_agent::dataplane::{Change, Dataplane, FamilyChange, batch, bpf::Bpf, pins::Pins};
use penstock_common::{Addr, Address, AddressKind, FilterBit, V4, V6, limits};
use penstock_testbed::{Random, Testbed, require_kernel};

/// The bits that are set.
fn bits(pins: &Pins, name: &str) -> Result<BTreeSet<u32>> {
    let elements = batch::lookup_all::<u32, u64>(pins.map(name)?.fd().as_fd(), 8_192)?;
    let set = elements.into_iter().flat_map(|(element, value)| {
        (0..64)
            .filter(move |bit| value >> bit & 1 != 0)
            .map(move |bit| element * 64 + bit)
    });
    Ok(set.collect())
}

fn number<A: Addr>(addr: A) -> u32 {
    let bit = FilterBit::of(addr);
    bit.element() * 64 + bit.mask().trailing_zeros()
}

/// Of so many addresses those that share a bit with another, some pairs of them.
fn sharing<A: Addr>(make: impl Fn(u64) -> A) -> Vec<A> {
    let mut random = Random(3);
    let mut seen: HashMap<u32, A> = HashMap::new();
    let mut pairs = Vec::new();
    for _ in 0..20_000 {
        let addr = make(random.word());
        if let Some(other) = seen.insert(number(addr), addr) {
            pairs.extend([other, addr]);
        }
    }
    pairs.truncate(40);
    assert_eq!(pairs.len(), 40, "twenty pairs share a bit");
    pairs
}

#[test]
fn programs_look_up_what_is_there_and_what_shares_its_bit() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let testbed = Testbed::new()?;
    let pins = Pins::create(&Path::new("/sys/fs/bpf").join(format!("{}-bits", testbed.prefix())))?;
    let programs = pins.load(true, false, limits::FLOWS)?;
    let v4 = sharing(|word| {
        let [a, b, c, ..] = word.to_be_bytes();
        V4::from_octets([10, a, b, c])
    });
    let v6 = sharing(|word| {
        let [a, b, c, ..] = word.to_be_bytes();
        V6::from_octets([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c])
    });
    let mut random = Random(7);
    let mut dataplane = Bpf::open(&pins)?;
    let (mut there4, mut there6) = (BTreeSet::new(), BTreeSet::new());
    for round in 0..100 {
        let mut changes = Vec::new();
        for _ in 0..=random.below(5) {
            let index = random.below(40);
            let address = Address {
                kind: random.pick(&[AddressKind::SERVICE, AddressKind::NODE]),
            };
            changes.push(match random.below(4) {
                0 => Change::V4(FamilyChange::PutAddress(v4[index], address)),
                1 => Change::V6(FamilyChange::PutAddress(v6[index], address)),
                2 => Change::V4(FamilyChange::DeleteAddress(v4[index])),
                _ => Change::V6(FamilyChange::DeleteAddress(v6[index])),
            });
        }
        if round % 10 == 9 {
            // What an agent leaves that ends between two writes.
            for name in ["ADDRESS_FILTER4", "ADDRESS_FILTER6"] {
                let mut elements: Array<MapData, u64> =
                    Map::from_map_data(pins.map(name)?)?.try_into()?;
                let element = random.below(FilterBit::ELEMENTS as usize) as u32;
                let value = elements.get(&element, 0)?;
                elements.set(element, value | 1 << random.below(64), 0)?;
            }
            dataplane = Bpf::open(&pins)?;
            let any = Address {
                kind: AddressKind::NODE,
            };
            changes.push(Change::V4(FamilyChange::PutAddress(v4[0], any)));
            changes.push(Change::V6(FamilyChange::PutAddress(v6[0], any)));
        }
        dataplane.apply(&changes)?;
        for change in changes {
            match change {
                Change::V4(FamilyChange::PutAddress(addr, _)) => drop(there4.insert(addr)),
                Change::V4(FamilyChange::DeleteAddress(addr)) => drop(there4.remove(&addr)),
                Change::V6(FamilyChange::PutAddress(addr, _)) => drop(there6.insert(addr)),
                Change::V6(FamilyChange::DeleteAddress(addr)) => drop(there6.remove(&addr)),
                _ => {}
            }
        }
        let wanted: BTreeSet<u32> = there4.iter().map(|addr| number(*addr)).collect();
        assert_eq!(bits(&pins, "ADDRESS_FILTER4")?, wanted, "IPv4, {round}");
        let wanted: BTreeSet<u32> = there6.iter().map(|addr| number(*addr)).collect();
        assert_eq!(bits(&pins, "ADDRESS_FILTER6")?, wanted, "IPv6, {round}");
    }
    drop(programs);
    Ok(())
}

#[test]
fn an_address_stays_looked_up_when_its_new_value_cannot_be_written() -> Result<()> {
    let Some(()) = require_kernel() else {
        return Ok(());
    };
    let testbed = Testbed::new()?;
    let pins = Pins::create(&Path::new("/sys/fs/bpf").join(format!("{}-full", testbed.prefix())))?;
    let _programs = pins.load(true, false, limits::FLOWS)?;
    let of = |kind| Address { kind };
    let (service, node) = (of(AddressKind::SERVICE), of(AddressKind::NODE));
    let others: Vec<V4> = (1..limits::ADDRESSES)
        .map(|count| V4::from_octets((10 << 24 | count).to_be_bytes()))
        .collect();
    let shared: BTreeSet<u32> = others.iter().map(|addr| number(*addr)).collect();
    let mut alone = (0..=255)
        .map(|last| V4::from_octets([192, 168, 0, last]))
        .filter(|addr| !shared.contains(&number(*addr)));
    let (known, new) = alone.next().zip(alone.next()).expect("two with own bits");

    let mut dataplane = Bpf::open(&pins)?;
    let put = |addr, address| Change::V4(FamilyChange::PutAddress(addr, address));
    let first = others.iter().chain([&known]);
    dataplane.apply(&first.map(|addr| put(*addr, service)).collect::<Vec<_>>())?;
    let refused = dataplane.apply(&[put(new, node), put(known, node)]);
    assert!(refused.is_err(), "the map is full");
    let bits = bits(&pins, "ADDRESS_FILTER4")?;
    assert!(bits.contains(&number(known)), "it is still there");
    assert!(bits.is_superset(&shared), "so are all others");
    Ok(())
}
