//! Addresses that programs know, written as the agent writes them.

use std::net::IpAddr;

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, MapData},
};
use penstock_common::{Addr, Address, FilterBit, V4, V6};

/// Makes an address one of a kind.
pub fn put(ebpf: &mut Ebpf, ip: IpAddr, kind: u32) {
    match ip {
        IpAddr::V4(ip) => put_of(ebpf, ["ADDRESSES4", "ADDRESS_FILTER4"], V4::from(ip), kind),
        IpAddr::V6(ip) => put_of(ebpf, ["ADDRESSES6", "ADDRESS_FILTER6"], V6::from(ip), kind),
    }
}

fn put_of<A: Addr + Pod>(ebpf: &mut Ebpf, [addresses, filter]: [&str; 2], ip: A, kind: u32) {
    let bit = FilterBit::of(ip);
    let map = ebpf.map_mut(filter).expect(filter);
    let mut elements: Array<&mut MapData, u64> = map.try_into().expect(filter);
    let old = elements.get(&bit.element(), 0).expect(filter);
    elements
        .set(bit.element(), old | bit.mask(), 0)
        .expect(filter);
    let map = ebpf.map_mut(addresses).expect(addresses);
    let mut known: HashMap<&mut MapData, A, Address> = map.try_into().expect(addresses);
    known.insert(ip, Address { kind }, 0).expect(addresses);
}
