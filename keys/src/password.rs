//! Joining by password: OPAQUE (RFC 9807) inside a TLS session.
//!
//! Nothing that is derived from the password alone is ever sent, so neither a recorder nor an
//! impostor at either end can test passwords offline: each guess takes one exchange with a member.
//! The member stores a [`PasswordRecord`] that it makes for itself from the password; a thief of
//! that record still pays one Argon2id per guess.
//!
//! ```text
//! joiner                                    sponsor (holds a PasswordRecord)
//! PasswordClient::start ── PasswordRequest ──────► PasswordServer::respond
//! PasswordClient::finish ◄── PasswordResponse ────
//!                        ── PasswordFinalization ► PasswordServer::finish
//! ```
//!
//! The joiner learns first whether the passwords are the same, and says so to the other end in the
//! protocol above; a sponsor that gets no finalization must count the exchange as a failed guess.
//!
//! ## Choices
//!
//! * Suite: ristretto255, SHA-512, 3DH, HKDF-SHA-512, HMAC-SHA-512: RFC 9807, section 7, first
//!   configuration.
//! * Stretching: Argon2id, version 0x13, t = 3, m = 64 MiB, p = 4, all-zero salt of 16 bytes (the
//!   OPRF salts): the second choice of RFC 9106, section 4, kept to the letter. p is 4 although the
//!   lanes are filled one after the other here: memory and passes are what an attacker pays for, and
//!   they do not depend on p, while a recommendation followed as it stands needs no defence.
//! * Context: `"hauberk/1" ‖ binding(32) ‖ joiner's key(32) ‖ sponsor's key(32)`, so that the
//!   exchange is valid in one TLS session between two identities only.
//! * Identities in the envelope: the sponsor's identity key as the server; none for the client. The
//!   envelope is sealed when the record is made, before any joiner is known, so the joiner's key can
//!   only be bound by the context. Both are covered by the MACs of the exchange.
//! * One credential identifier, `"hauberk cluster password"`: there is one password per cluster, and
//!   so no list of users that fake answers would have to hide.
//!
//! ## Layouts
//!
//! ```text
//! request        96    blinded element(32) ‖ nonce(32) ‖ key share(32)
//! response       320   evaluated element(32) ‖ masking nonce(32) ‖ masked response(128)
//!                      ‖ nonce(32) ‖ key share(32) ‖ MAC(64)
//! finalization   64    MAC
//! record file    one line, see `armor`: hauberk-password-record-1:<hex>
//!                of sponsor's key(32) ‖ server setup(128) ‖ registration(192)
//! ```

use crate::armor::{self, ArmorError};
use crate::hexbytes::fixed_bytes;
use crate::identity::IdentityKey;
use crate::secret::{Secret32, hkdf32};
use opaque_ke::errors::{InternalError, ProtocolError};
use opaque_ke::generic_array::{ArrayLength, GenericArray};
use opaque_ke::{
    CipherSuite, ClientLogin, ClientLoginFinishParameters, ClientRegistration,
    ClientRegistrationFinishParameters, CredentialFinalization, CredentialRequest, CredentialResponse,
    Identifiers, Ristretto255, ServerLogin, ServerLoginParameters, ServerRegistration, ServerSetup, TripleDh,
};
use rand_core::{CryptoRng, RngCore};
use std::fmt;
use zeroize::{Zeroize as _, Zeroizing};

/// A cluster's password, as bytes. No Unicode normalisation is done: the file is the password, byte
/// for byte, and the same file on every host is the same password.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(Zeroizing<Vec<u8>>);

impl Password {
    /// Reads the contents of a password file. One newline at its end (LF or CR LF) is not part of
    /// the password; every other byte is, also spaces.
    ///
    /// # Errors
    /// [`PasswordError::Empty`], [`PasswordError::TooLong`].
    pub fn from_file_contents(contents: Vec<u8>) -> Result<Self, PasswordError> {
        let mut bytes = Zeroizing::new(contents);
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
            if bytes.last() == Some(&b'\r') {
                bytes.pop();
            }
        }
        if bytes.is_empty() {
            return Err(PasswordError::Empty);
        }
        if bytes.len() > MAX_PASSWORD_LEN {
            return Err(PasswordError::TooLong { found: bytes.len() });
        }
        Ok(Self(bytes))
    }

    /// What to tell the operator about the password's strength, if anything.
    #[must_use]
    pub fn weakness(&self) -> Option<WeakPassword> {
        let distinct = self.0.iter().collect::<std::collections::BTreeSet<_>>().len();
        if self.0.len() < ADVISED_PASSWORD_LEN {
            Some(WeakPassword::Short)
        } else if distinct < ADVISED_DISTINCT {
            Some(WeakPassword::Repetitive)
        } else {
            None
        }
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(redacted)")
    }
}

/// A hint, not a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WeakPassword {
    /// Fewer than 8 bytes.
    #[error(
        "the password has fewer than {ADVISED_PASSWORD_LEN} characters; `meshctl keygen` makes a key file that cannot be guessed"
    )]
    Short,
    /// Fewer than 4 different bytes.
    #[error(
        "the password has fewer than {ADVISED_DISTINCT} different characters; `meshctl keygen` makes a key file that cannot be guessed"
    )]
    Repetitive,
}

/// What a member stores to check passwords: not the password, and no way to log in with it.
pub struct PasswordRecord {
    sponsor: IdentityKey,
    setup: ServerSetup<Suite>,
    registration: ServerRegistration<Suite>,
}

impl PasswordRecord {
    /// Makes the record of the member `sponsor`. Takes a quarter of a second and 64 MiB.
    ///
    /// # Errors
    /// [`PasswordError::Internal`] only if 64 MiB cannot be had.
    pub fn create(
        password: &Password,
        sponsor: &IdentityKey,
        rng: &mut (impl RngCore + CryptoRng),
    ) -> Result<Self, PasswordError> {
        let setup = ServerSetup::<Suite>::new(rng);
        let client = ClientRegistration::<Suite>::start(rng, &password.0).map_err(internal)?;
        let answer = ServerRegistration::start(&setup, client.message, CREDENTIAL).map_err(internal)?;
        let params = ClientRegistrationFinishParameters::new(identifiers(sponsor), None);
        let upload = client.state.finish(rng, &password.0, answer.message, params).map_err(internal)?;
        let mut export_key = upload.export_key;
        export_key.as_mut_slice().zeroize();
        Ok(Self { sponsor: *sponsor, setup, registration: ServerRegistration::finish(upload.message) })
    }

    /// Whose record it is.
    #[must_use]
    pub const fn sponsor(&self) -> IdentityKey {
        self.sponsor
    }

    /// The file form, for a file of mode 0600.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        let mut setup = self.setup.serialize();
        let mut registration = self.registration.serialize();
        let mut bytes = Zeroizing::new(Vec::with_capacity(RECORD_LEN));
        bytes.extend_from_slice(self.sponsor.as_bytes());
        bytes.extend_from_slice(&setup);
        bytes.extend_from_slice(&registration);
        setup.as_mut_slice().zeroize();
        registration.as_mut_slice().zeroize();
        armor::encode(RECORD_KIND, &bytes)
    }

    /// Reads [`PasswordRecord::to_text`].
    ///
    /// # Errors
    /// [`PasswordError::Armor`], [`PasswordError::Malformed`].
    pub fn from_text(text: &str) -> Result<Self, PasswordError> {
        let bytes = armor::decode::<RECORD_LEN>(RECORD_KIND, text)?;
        let malformed = |_| PasswordError::Malformed { what: "password record" };
        let (sponsor, rest) = bytes.split_at(IdentityKey::LEN);
        let (setup, registration) = rest.split_at(SETUP_LEN);
        let sponsor = sponsor.try_into().map_err(|_| PasswordError::Malformed { what: "password record" })?;
        Ok(Self {
            sponsor: IdentityKey::from_bytes(sponsor),
            setup: ServerSetup::deserialize(setup).map_err(malformed)?,
            registration: ServerRegistration::deserialize(registration).map_err(malformed)?,
        })
    }
}

impl fmt::Debug for PasswordRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PasswordRecord").field("sponsor", &self.sponsor).finish_non_exhaustive()
    }
}

/// What an exchange is bound to. Both ends must come to the same.
#[derive(Clone, Copy, Debug)]
pub struct PasswordContext<'a> {
    /// [`SessionSecrets::join_binding`](crate::SessionSecrets) of the session.
    pub binding: &'a [u8; 32],
    /// The node that joins.
    pub joiner: &'a IdentityKey,
    /// The member it joins at.
    pub sponsor: &'a IdentityKey,
}

impl PasswordContext<'_> {
    fn bytes(&self) -> Vec<u8> {
        [CONTEXT, self.binding, self.joiner.as_bytes(), self.sponsor.as_bytes()].concat()
    }
}

/// The joiner's side of one exchange.
pub struct PasswordClient {
    login: ClientLogin<Suite>,
    password: Password,
}

impl PasswordClient {
    /// Starts an exchange.
    ///
    /// # Errors
    /// [`PasswordError::Internal`].
    pub fn start(
        password: &Password,
        rng: &mut (impl RngCore + CryptoRng),
    ) -> Result<(Self, PasswordRequest), PasswordError> {
        let started = ClientLogin::<Suite>::start(rng, &password.0).map_err(internal)?;
        let request = PasswordRequest(fixed(&started.message.serialize(), "password request")?);
        Ok((Self { login: started.state, password: password.clone() }, request))
    }

    /// Checks the member's answer. Takes a quarter of a second and 64 MiB: run it where that does
    /// not matter.
    ///
    /// # Errors
    /// [`PasswordError::WrongPassword`] also if the context differs at the two ends;
    /// [`PasswordError::Malformed`] for an answer that no honest member sends.
    pub fn finish(
        self,
        response: &PasswordResponse,
        context: &PasswordContext<'_>,
        rng: &mut (impl RngCore + CryptoRng),
    ) -> Result<(PasswordFinalization, Secret32), PasswordError> {
        let response = CredentialResponse::<Suite>::deserialize(&response.0)
            .map_err(|_| PasswordError::Malformed { what: "password response" })?;
        let bytes = context.bytes();
        let params = ClientLoginFinishParameters::new(Some(&bytes), identifiers(context.sponsor), None);
        let mut done = self
            .login
            .finish(rng, &self.password.0, response, params)
            .map_err(|e| login(e, "password response"))?;
        let key = session_key(&done.session_key);
        done.session_key.as_mut_slice().zeroize();
        done.export_key.as_mut_slice().zeroize();
        Ok((PasswordFinalization(fixed(&done.message.serialize(), "password finalization")?), key))
    }
}

impl fmt::Debug for PasswordClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PasswordClient(redacted)")
    }
}

/// The member's side of one exchange.
pub struct PasswordServer {
    login: ServerLogin<Suite>,
}

impl PasswordServer {
    /// Answers a request. Cheap: no Argon2id on this side.
    ///
    /// # Errors
    /// [`PasswordError::OtherSponsor`] if the record is not that of the context's sponsor;
    /// [`PasswordError::Malformed`] for a request that no honest joiner sends.
    pub fn respond(
        record: &PasswordRecord,
        request: &PasswordRequest,
        context: &PasswordContext<'_>,
        rng: &mut (impl RngCore + CryptoRng),
    ) -> Result<(Self, PasswordResponse), PasswordError> {
        if record.sponsor != *context.sponsor {
            return Err(PasswordError::OtherSponsor);
        }
        let request = CredentialRequest::<Suite>::deserialize(&request.0)
            .map_err(|_| PasswordError::Malformed { what: "password request" })?;
        let bytes = context.bytes();
        let started = ServerLogin::start(
            rng,
            &record.setup,
            Some(record.registration.clone()),
            request,
            CREDENTIAL,
            server_parameters(&bytes, context),
        )
        .map_err(|e| login(e, "password request"))?;
        let response = PasswordResponse(fixed(&started.message.serialize(), "password response")?);
        Ok((Self { login: started.state }, response))
    }

    /// Checks the joiner's last message: it knows the password.
    ///
    /// # Errors
    /// [`PasswordError::WrongPassword`]; the joiner is not to be admitted.
    pub fn finish(
        self,
        finalization: &PasswordFinalization,
        context: &PasswordContext<'_>,
    ) -> Result<Secret32, PasswordError> {
        let message = CredentialFinalization::<Suite>::deserialize(&finalization.0)
            .map_err(|_| PasswordError::Malformed { what: "password finalization" })?;
        let bytes = context.bytes();
        let mut done = self
            .login
            .finish(message, server_parameters(&bytes, context))
            .map_err(|e| login(e, "password finalization"))?;
        let key = session_key(&done.session_key);
        done.session_key.as_mut_slice().zeroize();
        Ok(key)
    }
}

impl fmt::Debug for PasswordServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PasswordServer(redacted)")
    }
}

fixed_bytes! {
    /// First message, from the joiner.
    PasswordRequest, 96, "password request"
}

fixed_bytes! {
    /// Second message, from the member.
    PasswordResponse, 320, "password response"
}

fixed_bytes! {
    /// Third message, from the joiner.
    PasswordFinalization, 64, "password finalization"
}

/// Why a password, a record or an exchange is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PasswordError {
    /// The password file holds nothing.
    #[error("the password is empty")]
    Empty,
    /// The password file holds more than a password.
    #[error(
        "the password has {found} bytes, but at most {MAX_PASSWORD_LEN} are allowed; is it the right file?"
    )]
    TooLong {
        /// Length in bytes.
        found: usize,
    },
    /// The two ends were given different passwords, or there is someone between them. The exchange
    /// is over.
    #[error("the password is not the one of the cluster")]
    WrongPassword,
    /// A message or record that the protocol never produces. The exchange is over.
    #[error("malformed {what}")]
    Malformed {
        /// Which message.
        what: &'static str,
    },
    /// The record was made for another member.
    #[error("the password record was made by another identity; make a new one from the password")]
    OtherSponsor,
    /// The record's file is not one.
    #[error(transparent)]
    Armor(#[from] ArmorError),
    /// The cryptographic library failed for another reason; 64 MiB of memory are needed.
    #[error("password cryptography failed: {0}")]
    Internal(ProtocolError),
}

struct Suite;

impl CipherSuite for Suite {
    type OprfCs = Ristretto255;
    type KeyExchange = TripleDh<Ristretto255, sha2::Sha512>;
    type Ksf = Stretch;
}

/// Argon2id with the parameters of the module's documentation. As the default of the suite it cannot
/// be left out at one end.
#[derive(Default)]
struct Stretch;

impl opaque_ke::ksf::Ksf for Stretch {
    fn hash<L: ArrayLength<u8>>(
        &self,
        input: GenericArray<u8, L>,
    ) -> Result<GenericArray<u8, L>, InternalError> {
        let input = Zeroizing::new(input);
        let params = argon2::Params::new(ARGON2_KIB, ARGON2_PASSES, ARGON2_LANES, None)
            .map_err(|_| InternalError::KsfError)?;
        let mut memory = Vec::new();
        memory.try_reserve_exact(params.block_count()).map_err(|_| InternalError::KsfError)?;
        memory.resize(params.block_count(), argon2::Block::default());
        let mut memory = Zeroizing::new(memory);
        let mut output = GenericArray::default();
        argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params)
            .hash_password_into_with_memory(&input, &ARGON2_SALT, &mut output, memory.as_mut_slice())
            .map_err(|_| InternalError::KsfError)?;
        Ok(output)
    }
}

fn identifiers(sponsor: &IdentityKey) -> Identifiers<'_> {
    Identifiers { client: None, server: Some(sponsor.as_bytes()) }
}

fn server_parameters<'a>(bytes: &'a [u8], context: &PasswordContext<'a>) -> ServerLoginParameters<'a, 'a> {
    ServerLoginParameters { context: Some(bytes), identifiers: identifiers(context.sponsor) }
}

fn session_key(opaque: &[u8]) -> Secret32 {
    hkdf32(b"hauberk password session v1", opaque, &[])
}

fn fixed<const N: usize>(bytes: &[u8], what: &'static str) -> Result<[u8; N], PasswordError> {
    bytes.try_into().map_err(|_| PasswordError::Malformed { what })
}

fn internal(error: ProtocolError) -> PasswordError {
    PasswordError::Internal(error)
}

fn login(error: ProtocolError, what: &'static str) -> PasswordError {
    match error {
        ProtocolError::InvalidLoginError => PasswordError::WrongPassword,
        ProtocolError::SerializationError
        | ProtocolError::SizeError { .. }
        | ProtocolError::ReflectedValueError => PasswordError::Malformed { what },
        ProtocolError::LibraryError(_) | ProtocolError::Custom(_) => PasswordError::Internal(error),
    }
}

const CONTEXT: &[u8] = b"hauberk/1";
const CREDENTIAL: &[u8] = b"hauberk cluster password";
const ARGON2_KIB: u32 = 64 * 1024;
const ARGON2_PASSES: u32 = 3;
const ARGON2_LANES: u32 = 4;
const ARGON2_SALT: [u8; 16] = [0; 16];
const RECORD_KIND: &str = "hauberk-password-record-1";
const SETUP_LEN: usize = 128;
const RECORD_LEN: usize = IdentityKey::LEN + SETUP_LEN + 192;
/// More than anyone types, and far below the 65,535 bytes that the OPRF takes.
const MAX_PASSWORD_LEN: usize = 1024;
const ADVISED_PASSWORD_LEN: usize = 8;
const ADVISED_DISTINCT: usize = 4;
