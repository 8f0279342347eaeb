//! The part of the kernel's eBPF that a socket filter needs: instructions, maps and the system call.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::libc;

/// An instruction in the kernel's layout.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// A register. Loads and calls write [`RESULT`]; calls overwrite the registers of their arguments.
pub(crate) type Register = u8;
pub(crate) const RESULT: Register = 0;
pub(crate) const ARGUMENTS: [Register; 2] = [1, 2];
/// The register in which load instructions expect the frame.
pub(crate) const FRAME: Register = 6;
/// Registers that calls do not change.
pub(crate) const KEPT: [Register; 3] = [7, 8, 9];
/// The end of the stack. Read-only.
pub(crate) const STACK: Register = 10;

/// The width of a load or store.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Size {
    Word = 0x00,
    Half = 0x08,
    Byte = 0x10,
    Double = 0x18,
}

/// The condition of a jump. Comparisons are unsigned and of 32 bits.
#[derive(Clone, Copy, Debug)]
pub(crate) enum If {
    Equal = 0x10,
    AtLeast = 0x30,
    AnyBits = 0x40,
    Differs = 0x50,
}

/// An arithmetic operation on a register and a constant.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arithmetic {
    Add = 0x00,
    And = 0x50,
    ShiftLeft = 0x60,
    Set = 0xb0,
}

const CLASS_LOAD: u8 = 0x00;
const CLASS_LOAD_FROM: u8 = 0x01;
const CLASS_STORE: u8 = 0x03;
const CLASS_JUMP: u8 = 0x05;
const CLASS_JUMP_32: u8 = 0x06;
const CLASS_ARITHMETIC: u8 = 0x07;
const ABSOLUTE: u8 = 0x20;
const INDIRECT: u8 = 0x40;
const MEMORY: u8 = 0x60;
const ATOMIC: u8 = 0xc0;
const WITH_REGISTER: u8 = 0x08;
const OR: u8 = 0x40;
const CALL: u8 = 0x80;
const EXIT: u8 = 0x90;
/// Marks a 64-bit constant as the descriptor of a map.
const PSEUDO_MAP: Register = 1;

impl Instruction {
    fn new(code: u8, to: Register, from: Register, offset: i16, immediate: i32) -> Self {
        let registers = if cfg!(target_endian = "little") { to | from << 4 } else { to << 4 | from };
        Self { code, registers, offset, immediate }
    }

    /// Loads from the frame into [`RESULT`], or ends the program with 0 if the frame is not that long.
    pub(crate) fn load(size: Size, at: u32) -> Self {
        Self::new(CLASS_LOAD | ABSOLUTE | size as u8, 0, 0, 0, at.cast_signed())
    }

    /// The same, at an offset to which a register is added.
    pub(crate) fn load_behind(size: Size, from: Register, at: u32) -> Self {
        Self::new(CLASS_LOAD | INDIRECT | size as u8, 0, from, 0, at.cast_signed())
    }

    pub(crate) fn load_from(size: Size, to: Register, from: Register, offset: i16) -> Self {
        Self::new(CLASS_LOAD_FROM | MEMORY | size as u8, to, from, offset, 0)
    }

    pub(crate) fn store(size: Size, to: Register, offset: i16, from: Register) -> Self {
        Self::new(CLASS_STORE | MEMORY | size as u8, to, from, offset, 0)
    }

    pub(crate) fn compute(register: Register, what: Arithmetic, number: i32) -> Self {
        Self::new(CLASS_ARITHMETIC | what as u8, register, 0, 0, number)
    }

    pub(crate) fn copy(to: Register, from: Register) -> Self {
        Self::new(CLASS_ARITHMETIC | Arithmetic::Set as u8 | WITH_REGISTER, to, from, 0, 0)
    }

    pub(crate) fn or(to: Register, from: Register) -> Self {
        Self::new(CLASS_ARITHMETIC | OR | WITH_REGISTER, to, from, 0, 0)
    }

    pub(crate) fn add(to: Register, from: Register) -> Self {
        Self::new(CLASS_ARITHMETIC | Arithmetic::Add as u8 | WITH_REGISTER, to, from, 0, 0)
    }

    /// Atomically adds a register to the 64-bit number at an address.
    pub(crate) fn add_atomically(address: Register, number: Register) -> Self {
        Self::new(CLASS_STORE | ATOMIC | Size::Double as u8, address, number, 0, 0)
    }

    /// A map as an argument: two instructions.
    pub(crate) fn load_map(to: Register, map: &Map) -> [Self; 2] {
        let descriptor = map.descriptor.as_raw_fd();
        let code = CLASS_LOAD | Size::Double as u8;
        [Self::new(code, to, PSEUDO_MAP, 0, descriptor), Self::new(0, 0, 0, 0, 0)]
    }

    /// Looks up a key in a map. The arguments are the map and the address of the key, the result is the address of the value
    /// or 0.
    pub(crate) fn look_up() -> Self {
        const MAP_LOOKUP: i32 = 1;
        Self::new(CLASS_JUMP | CALL, 0, 0, 0, MAP_LOOKUP)
    }

    pub(crate) fn jump_if(register: Register, condition: If, number: u32) -> Self {
        Self::new(CLASS_JUMP_32 | condition as u8, register, 0, 0, number.cast_signed())
    }

    /// The same with the number in another register.
    pub(crate) fn jump_if_as(register: Register, condition: If, other: Register) -> Self {
        Self::new(CLASS_JUMP_32 | condition as u8 | WITH_REGISTER, register, other, 0, 0)
    }

    /// The same for 64 bits.
    pub(crate) fn jump_if_wide(register: Register, condition: If, other: Register) -> Self {
        Self::new(CLASS_JUMP | condition as u8 | WITH_REGISTER, register, other, 0, 0)
    }

    /// The same for an address that may be 0.
    pub(crate) fn jump_if_null(register: Register, condition: If) -> Self {
        Self::new(CLASS_JUMP | condition as u8, register, 0, 0, 0)
    }

    pub(crate) fn exit() -> Self {
        Self::new(CLASS_JUMP | EXIT, 0, 0, 0, 0)
    }

    /// Sets how many instructions a jump skips.
    pub(crate) fn skips(&mut self, instructions: i16) {
        self.offset = instructions;
    }
}

/// A table that programs and this process share.
#[derive(Debug)]
pub(crate) struct Map {
    descriptor: OwnedFd,
    value_size: u32,
}

/// The commands of the system call.
const CREATE_MAP: libc::c_int = 0;
const LOOK_UP_ELEMENT: libc::c_int = 1;
const UPDATE_ELEMENT: libc::c_int = 2;
const DELETE_ELEMENT: libc::c_int = 3;
const LOAD_PROGRAM: libc::c_int = 5;

/// The argument of the commands on elements.
#[repr(C)]
struct Element {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The argument of [`LOAD_PROGRAM`].
#[repr(C)]
struct Load {
    kind: u32,
    length: u32,
    program: u64,
    license: u64,
    log: [u64; 2],
}

impl Map {
    /// A hash map from a number to a value of `value_size` bytes, for up to `max` elements. Memory is allocated per element.
    pub(crate) fn new(value_size: usize, max: u32) -> io::Result<Self> {
        const HASH: u32 = 1;
        const NO_PREALLOCATION: u32 = 1;
        let value_size = u32::try_from(value_size).map_err(|_| io::ErrorKind::InvalidInput)?;
        Ok(Self { descriptor: open(CREATE_MAP, &[HASH, 4, value_size, max, NO_PREALLOCATION])?, value_size })
    }

    /// Sets the value of a key. It must have the size of the map's values.
    pub(crate) fn insert<T>(&self, number: u32, value: &T) -> io::Result<()> {
        if size_of::<T>() != self.value_size as usize {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        bpf(UPDATE_ELEMENT, &self.element(&number, address_of(value))).map(drop)
    }

    /// The value of a key, which must exist, in a map of 64-bit values.
    pub(crate) fn count(&self, number: u32) -> io::Result<u64> {
        let mut value = 0_u64;
        if self.value_size as usize != size_of_val(&value) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let address = std::ptr::from_mut(&mut value).expose_provenance() as u64;
        bpf(LOOK_UP_ELEMENT, &self.element(&number, address))?;
        Ok(value)
    }

    /// Removes a key, if it exists.
    pub(crate) fn remove(&self, number: u32) -> io::Result<()> {
        match bpf(DELETE_ELEMENT, &self.element(&number, 0)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done.map(drop),
        }
    }

    fn element(&self, key: &u32, value: u64) -> Element {
        // A descriptor is never negative.
        let map = self.descriptor.as_raw_fd().cast_unsigned();
        Element { map, padding: 0, key: address_of(key), value, flags: 0 }
    }
}

/// A program that decides how many bytes of a frame a socket captures.
#[derive(Debug)]
pub(crate) struct SocketFilter {
    descriptor: OwnedFd,
}

impl SocketFilter {
    /// Loads a program into the kernel, which verifies it.
    pub(crate) fn load(program: &[Instruction]) -> io::Result<Self> {
        const SOCKET_FILTER: u32 = 1;
        let length = u32::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let (first, license) = (program.as_ptr().expose_provenance() as u64, c"Dual MIT/GPL");
        let license = license.as_ptr().expose_provenance() as u64;
        let attributes = Load { kind: SOCKET_FILTER, length, program: first, license, log: [0; 2] };
        Ok(Self { descriptor: open(LOAD_PROGRAM, &attributes)? })
    }
}

impl AsFd for SocketFilter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

fn address_of<T>(value: &T) -> u64 {
    std::ptr::from_ref(value).expose_provenance() as u64
}

/// Runs a command that returns a new descriptor.
fn open<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    let descriptor = bpf(command, attributes)?;
    // SAFETY: the descriptor was just made, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// The system call. Values whose addresses are in `attributes` must outlive it.
fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    let length = size_of::<T>() as libc::c_uint;
    // SAFETY: the pointer and length are those of a value that outlives the call, and so do, with the callers above,
    // the values whose addresses it holds.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), length) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    libc::c_int::try_from(result).map_err(|_| io::ErrorKind::InvalidData.into())
}
