//! Preloaded (`LD_PRELOAD`) into a process, this adds to its wall clock what a file says: eight bytes, the
//! offset in milliseconds, little-endian, at the path in `DRILL_CLOCK`. Whoever writes the file sets the
//! clock while the process runs. Other clocks go on as they do, as on a machine whose time is set.
//!
//! A preloaded function may be called before anything is ready, by the allocator among others: so
//! nothing here allocates, locks, or needs the library's own start. Linux only.

use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI64, AtomicPtr, Ordering};

use libc::{c_int, c_long, c_void, clockid_t, time_t, timespec, timeval};

/// The environment's variable that names the file.
const VARIABLE: &std::ffi::CStr = c"DRILL_CLOCK";
const NS: c_long = 1_000_000_000;

/// What is added where there is no file.
static NOTHING: AtomicI64 = AtomicI64::new(0);
/// The file, once it was looked for.
static OFFSET: AtomicPtr<AtomicI64> = AtomicPtr::new(null_mut());

/// The file as memory. Two threads that look for it at once map it twice, which harms nobody.
fn offset_ms() -> i64 {
    let mut found = OFFSET.load(Ordering::Acquire);
    if found.is_null() {
        // SAFETY: `map` gives a mapping of at least eight bytes that is never taken away, or nothing.
        found = unsafe { map() }.unwrap_or((&raw const NOTHING).cast_mut());
        OFFSET.store(found, Ordering::Release);
    }
    // SAFETY: it points to `NOTHING` or to the mapping; both live as long as the process.
    i64::from_le(unsafe { &*found }.load(Ordering::Relaxed))
}

unsafe fn map() -> Option<*mut AtomicI64> {
    // SAFETY: plain calls into libc with arguments that live as long as they do; none allocates.
    unsafe {
        let path = libc::getenv(VARIABLE.as_ptr());
        if path.is_null() {
            return None;
        }
        let file = libc::open(path, libc::O_RDONLY | libc::O_CLOEXEC);
        if file < 0 {
            return None;
        }
        let size = size_of::<i64>();
        let at = libc::mmap(null_mut(), size, libc::PROT_READ, libc::MAP_SHARED, file, 0);
        libc::close(file);
        (at != libc::MAP_FAILED).then_some(at.cast())
    }
}

/// The kernel's answer, and what the file adds to it.
fn wall_clock() -> timespec {
    let mut now = MaybeUninit::<timespec>::uninit();
    // SAFETY: the kernel fills `now`; it never fails for this clock. The call itself, and not libc's
    // function, for that is this library.
    let now = unsafe {
        libc::syscall(libc::SYS_clock_gettime, libc::CLOCK_REALTIME, now.as_mut_ptr());
        now.assume_init()
    };
    let offset_ms = offset_ms();
    let ns = now.tv_nsec + offset_ms.rem_euclid(1_000) * 1_000_000;
    let seconds = now.tv_sec + offset_ms.div_euclid(1_000) + ns / NS;
    timespec { tv_sec: seconds, tv_nsec: ns % NS }
}

/// # Safety
/// As of the function of libc whose place it takes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: clockid_t, time: *mut timespec) -> c_int {
    if clock == libc::CLOCK_REALTIME || clock == libc::CLOCK_REALTIME_COARSE {
        // SAFETY: the caller's promise.
        unsafe { time.write(wall_clock()) };
        return 0;
    }
    // SAFETY: the caller's promise; the kernel looks at the clock and the address itself.
    let answer = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) };
    if answer == 0 { 0 } else { -1 }
}

/// # Safety
/// As of the function of libc whose place it takes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gettimeofday(time: *mut timeval, _zone: *mut c_void) -> c_int {
    if !time.is_null() {
        let now = wall_clock();
        // SAFETY: the caller's promise.
        unsafe { time.write(timeval { tv_sec: now.tv_sec, tv_usec: now.tv_nsec / 1_000 }) };
    }
    0
}

/// # Safety
/// As of the function of libc whose place it takes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn time(time: *mut time_t) -> time_t {
    let now = wall_clock().tv_sec;
    if !time.is_null() {
        // SAFETY: the caller's promise.
        unsafe { time.write(now) };
    }
    now
}
