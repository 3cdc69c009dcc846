//! The programs' stacks: Linux before 6.18 gives a chain of functions 512 bytes together, and rounds
//! what each takes up to 32 (`check_max_stack_depth` in kernel/bpf/verifier.c). Newer kernels take
//! what older ones refuse, so this is counted here, from the object, and not left to them.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs,
    reason = "a test fails by panicking"
)]

use std::collections::{BTreeMap, BTreeSet};

use object::{Object, ObjectSection, ObjectSymbol, RelocationTarget, SymbolKind};

/// The most that a chain of functions may take, in bytes.
const LIMIT: u32 = 512;
/// What a function takes at least, and what it is rounded up to.
const STEP: u32 = 32;

/// An instruction (RFC 9669, 3).
struct Instruction {
    opcode: u8,
    dst: u8,
    src: u8,
    offset: i16,
    imm: i32,
}

impl Instruction {
    const SIZE: usize = 8;
    const FRAME_POINTER: u8 = 10;

    fn read(bytes: &[u8]) -> Self {
        Self {
            opcode: bytes[0],
            dst: bytes[1] & 0xf,
            src: bytes[1] >> 4,
            offset: i16::from_le_bytes([bytes[2], bytes[3]]),
            imm: i32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        }
    }
}

/// What a function takes, and whom it calls.
#[derive(Default)]
struct Function {
    name: String,
    stack: u32,
    calls: BTreeSet<Place>,
}

/// A section, and an offset in it.
type Place = (usize, u64);

fn functions(file: &object::File<'_>) -> BTreeMap<Place, Function> {
    let mut found = BTreeMap::new();
    for symbol in file
        .symbols()
        .filter(|symbol| symbol.kind() == SymbolKind::Text)
    {
        let index = symbol.section_index().expect("functions are in sections");
        let section = file.section_by_index(index).expect("a section");
        if symbol.size() == 0 {
            continue;
        }
        let code = section.data().expect("its content");
        let (from, to) = (symbol.address(), symbol.address() + symbol.size());
        let targets: BTreeMap<u64, Place> = section
            .relocations()
            .filter_map(|(at, relocation)| {
                let RelocationTarget::Symbol(target) = relocation.target() else {
                    return None;
                };
                let target = file.symbol_by_index(target).expect("a symbol");
                Some((at, (target.section_index()?.0, target.address())))
            })
            .collect();
        let mut function = Function {
            name: symbol.name().expect("a name").to_owned(),
            ..Function::default()
        };
        let mut lowest = 0_i32;
        let mut copies = [false; 16];
        let mut at = from;
        while at < to {
            let bytes = &code[at as usize..at as usize + Instruction::SIZE];
            let Instruction {
                opcode,
                dst,
                src,
                offset,
                imm,
            } = Instruction::read(bytes);
            match opcode {
                // A call of another of the object's functions.
                0x85 if src == 1 => {
                    let next = at as i64 + Instruction::SIZE as i64;
                    let place = match targets.get(&at) {
                        // To a section's begin: the instruction says how far into it.
                        Some((section, 0)) if imm != -1 => (
                            *section,
                            (i64::from(imm) + 1) as u64 * Instruction::SIZE as u64,
                        ),
                        Some(place) => *place,
                        None => (
                            index.0,
                            (next + i64::from(imm) * Instruction::SIZE as i64) as u64,
                        ),
                    };
                    function.calls.insert(place);
                }
                // A pointer into the stack in the making: a copy, then a sum.
                0xbf => copies[usize::from(dst)] = src == Instruction::FRAME_POINTER,
                0x07 if copies[usize::from(dst)] => {
                    lowest = lowest.min(imm);
                    copies[usize::from(dst)] = false;
                }
                _ => {}
            }
            let class = opcode & 7;
            let is_store = matches!(class, 2 | 3) && dst == Instruction::FRAME_POINTER;
            let is_load = class == 1 && src == Instruction::FRAME_POINTER;
            if is_store || is_load {
                lowest = lowest.min(i32::from(offset));
            }
            // A 64-bit constant takes the room of two.
            at += Instruction::SIZE as u64 * if opcode == 0x18 { 2 } else { 1 };
        }
        function.stack = lowest.unsigned_abs();
        found.insert((index.0, from), function);
    }
    found
}

/// What the deepest chain from a function takes, and that chain.
fn deepest(functions: &BTreeMap<Place, Function>, from: &Place) -> (u32, String) {
    let function = functions.get(from).expect("calls are to functions");
    let own = function.stack.max(1).next_multiple_of(STEP);
    let below = function.calls.iter().map(|call| deepest(functions, call));
    let (depth, chain) = below.max().unwrap_or_default();
    (own + depth, format!("{} {own} {chain}", function.name))
}

#[test]
fn every_chain_of_functions_fits_the_stack_of_older_kernels() {
    let object = penstock_agent::dataplane::OBJECT;
    let file = object::File::parse(object).expect("the object is ELF");
    let functions = functions(&file);
    let names: BTreeSet<&str> = functions.values().map(|function| &*function.name).collect();
    // That functions, their stacks and their calls were found at all.
    for name in [
        "from_pod",
        "to_pod",
        "from_uplink",
        "connect6",
        "request6",
        "xdp_uplink",
        "carry6",
        "begin6",
    ] {
        assert!(names.contains(name), "{name} is none of {names:?}");
    }
    let all: Vec<(u32, String)> = functions
        .keys()
        .map(|place| deepest(&functions, place))
        .collect();
    assert!(all.iter().any(|(depth, _)| *depth > 256), "{all:?}");
    for (depth, chain) in all {
        assert!(depth <= LIMIT, "{depth} bytes: {chain}");
    }
}
