//! ChaCha20-Poly1305 (RFC 8439) by Intel's Multi-Buffer Crypto library, `libIPSec_MB`, when the host has it.
//!
//! It is what VPP and DPDK encrypt with. On processors with AVX-512 it needs about two thirds of the time of the
//! assembly in `ring`, on others more than that, so it is used only there. It is looked for when the program runs:
//! nothing is needed to build, and nothing is lost where it is missing.
//!
//! What is declared here of `IMB_JOB` is the same in every release from 1.1 to 2.0.2, and the names of the files promise
//! that for the rest of 1.x and 2.x. Release 3.0 changes it; it and those before 1.1 are refused.

use std::ffi::{c_int, c_void};
use std::ptr::{self, NonNull};
use std::sync::Mutex;

use subtle::ConstantTimeEq as _;
use thiserror::Error;

/// Bytes of the authentication tag.
pub const TAG_LEN: usize = 16;

const NAMES: [&str; 2] = ["libIPSec_MB.so.2", "libIPSec_MB.so.1"];
/// As `imb_get_version` gives them: major, minor and patch level, one byte each.
const VERSIONS: std::ops::Range<u32> = 0x01_01_00..0x03_00_00;

/// Why the library cannot be used here.
#[derive(Debug, Error)]
pub enum Unavailable {
    /// It would be slower than the alternatives.
    #[error("the processor lacks AVX-512 with IFMA, VAES, GFNI and VPCLMULQDQ")]
    Processor,
    /// It is not installed, or does not fit this program.
    #[error("the library cannot be loaded: {0}")]
    Library(#[from] libloading::Error),
    /// Its interface may differ from the one declared here.
    #[error("the library is release {0}, not one from 1.1 to 2.x")]
    Release(String),
    /// Its own self-test failed, or there is no memory.
    #[error("the library does not start (its error {0})")]
    Start(c_int),
}

/// The beginning of `IMB_JOB`, with the fields of ChaCha20-Poly1305 in its union.
#[repr(C)]
struct Job {
    encryption_key: *const c_void,
    decryption_key: *const c_void,
    key_len: u64,
    source: *const u8,
    destination: *mut u8,
    cipher_offset: u64,
    cipher_len: u64,
    hash_offset: u64,
    hash_len: u64,
    nonce: *const u8,
    nonce_len: u64,
    tag: *mut u8,
    tag_len: u64,
    aad: *const c_void,
    aad_len: u64,
    context: *mut c_void,
    status: c_int,
    cipher_mode: c_int,
    direction: c_int,
    hash: c_int,
    order: c_int,
}

const STATUS_COMPLETED: c_int = 3;
const CIPHER_CHACHA20_POLY1305: c_int = 19;
const HASH_CHACHA20_POLY1305: c_int = 29;
const ENCRYPT: c_int = 1;
const DECRYPT: c_int = 2;
const CIPHER_THEN_HASH: c_int = 1;
const HASH_THEN_CIPHER: c_int = 2;

type Manager = *mut c_void;

/// The library, loaded.
pub struct Library {
    version: String,
    allocate: unsafe extern "C" fn(u64) -> Manager,
    free: unsafe extern "C" fn(Manager),
    initialize: unsafe extern "C" fn(Manager),
    error: unsafe extern "C" fn(Manager) -> c_int,
    next_job: unsafe extern "C" fn(Manager) -> *mut Job,
    submit: unsafe extern "C" fn(Manager) -> *mut Job,
    /// The functions are part of it.
    _loaded: libloading::Library,
}

impl Library {
    /// Loads the library from where the dynamic linker finds it.
    ///
    /// # Errors
    /// Why it cannot be used here; see [`Unavailable`].
    pub fn load() -> Result<Self, Unavailable> {
        if !processor_is_fit() {
            return Err(Unavailable::Processor);
        }
        #[expect(unsafe_code, reason = "foreign code can only be trusted")]
        // SAFETY: initializing this library only looks at the processor.
        let open = |name: &str| unsafe { libloading::Library::new(name) };
        let [newer, older] = NAMES;
        let loaded = open(newer).or_else(|_| open(older))?;
        #[expect(unsafe_code, reason = "the types of foreign functions can only be stated")]
        // SAFETY: these are the types in the header of each release in VERSIONS, and the functions are called only
        // while `loaded` lives.
        unsafe {
            let release = *loaded.get::<unsafe extern "C" fn() -> u32>(b"imb_get_version\0")?;
            let release = release();
            let version = format!("{}.{}.{}", release >> 16, release >> 8 & 0xff, release & 0xff);
            if !VERSIONS.contains(&release) {
                return Err(Unavailable::Release(version));
            }
            Ok(Self {
                version,
                allocate: *loaded.get(b"alloc_mb_mgr\0")?,
                free: *loaded.get(b"free_mb_mgr\0")?,
                initialize: *loaded.get(b"init_mb_mgr_avx512\0")?,
                error: *loaded.get(b"imb_get_errno\0")?,
                next_job: *loaded.get(b"get_next_job_avx512\0")?,
                submit: *loaded.get(b"submit_job_avx512\0")?,
                _loaded: loaded,
            })
        }
    }

    /// Its release, as in `1.3.0`.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }
}

#[cfg(target_arch = "x86_64")]
fn processor_is_fit() -> bool {
    std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512dq")
        && std::is_x86_feature_detected!("avx512vl")
        && std::is_x86_feature_detected!("avx512ifma")
        && std::is_x86_feature_detected!("vaes")
        && std::is_x86_feature_detected!("gfni")
        && std::is_x86_feature_detected!("vpclmulqdq")
}

#[cfg(not(target_arch = "x86_64"))]
fn processor_is_fit() -> bool {
    false
}

/// The library's state for one thread.
pub struct Worker {
    library: &'static Library,
    manager: NonNull<c_void>,
}

impl Worker {
    /// # Errors
    /// [`Unavailable::Start`].
    pub fn new(library: &'static Library) -> Result<Self, Unavailable> {
        // What the library notes about errors while it starts is not per thread.
        static STARTING: Mutex<()> = Mutex::new(());
        let _one_at_a_time = STARTING.lock();
        #[expect(unsafe_code, reason = "foreign functions")]
        // SAFETY: the manager is initialized before any other use, and owned by the worker.
        unsafe {
            let manager = NonNull::new((library.allocate)(0)).ok_or(Unavailable::Start(0))?;
            let worker = Self { library, manager };
            (library.initialize)(manager.as_ptr());
            match (library.error)(manager.as_ptr()) {
                0 => Ok(worker),
                error => Err(Unavailable::Start(error)),
            }
        }
    }

    /// Encrypts `text` in place, without associated data. `None` when the library refuses, which it has no reason to.
    pub fn seal(&mut self, key: &[u8; 32], nonce: &[u8; 12], text: &mut [u8]) -> Option<[u8; TAG_LEN]> {
        self.run(key, nonce, text, ENCRYPT, CIPHER_THEN_HASH)
    }

    /// Decrypts `text` in place; whether the tag is right. If it is not, `text` is worthless.
    #[must_use]
    pub fn open(&mut self, key: &[u8; 32], nonce: &[u8; 12], text: &mut [u8], tag: &[u8; TAG_LEN]) -> bool {
        let right = self.run(key, nonce, text, DECRYPT, HASH_THEN_CIPHER);
        right.is_some_and(|right| right.ct_eq(tag).into())
    }

    fn run(
        &mut self,
        key: &[u8; 32],
        nonce: &[u8; 12],
        text: &mut [u8],
        direction: c_int,
        order: c_int,
    ) -> Option<[u8; TAG_LEN]> {
        let mut tag = [0; TAG_LEN];
        let manager = self.manager.as_ptr();
        #[expect(unsafe_code, reason = "foreign functions")]
        // SAFETY: the manager is initialized, and of this thread alone (`&mut self`, not `Send`). The job is a place in
        // it, at least as long as `Job`. What the job points to outlives it: this cipher is done when `submit` returns.
        unsafe {
            let job = (self.library.next_job)(manager);
            ptr::write(
                job,
                Job {
                    encryption_key: key.as_ptr().cast(),
                    decryption_key: key.as_ptr().cast(),
                    key_len: key.len() as u64,
                    source: text.as_ptr(),
                    destination: text.as_mut_ptr(),
                    cipher_offset: 0,
                    cipher_len: text.len() as u64,
                    hash_offset: 0,
                    hash_len: text.len() as u64,
                    nonce: nonce.as_ptr(),
                    nonce_len: nonce.len() as u64,
                    tag: tag.as_mut_ptr(),
                    tag_len: TAG_LEN as u64,
                    aad: ptr::null(),
                    aad_len: 0,
                    context: ptr::null_mut(),
                    status: 0,
                    cipher_mode: CIPHER_CHACHA20_POLY1305,
                    direction,
                    hash: HASH_CHACHA20_POLY1305,
                    order,
                },
            );
            let done = (self.library.submit)(manager);
            (done == job && (*done).status == STATUS_COMPLETED).then_some(tag)
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        #[expect(unsafe_code, reason = "foreign functions")]
        // SAFETY: the library made it, and nothing else uses it.
        unsafe {
            (self.library.free)(self.manager.as_ptr());
        }
    }
}
