//! Identities, cluster genesis, join proofs, sealed frames and key schedules of Hauberk.
//!
//! The crate is pure: no sockets, no threads, no clock, and randomness comes in as an argument.
//! Nothing in it is `unsafe`.
//!
//! | module | concept |
//! |---|---|
//! | [`identity`] | a node's Ed25519 key, the node id that follows from it, signatures with domains |
//! | [`signed`] | a signed body kept byte for byte, so that fields of newer versions pass through |
//! | [`cluster`] | the genesis document, the cluster id, the IPv6 ranges that follow from it |
//! | [`admission`] | a member's statement that a node may take part |
//! | [`removal`] | the statement that it may not any more |
//! | [`admin`] | the key that stands above the members of an anchored cluster |
//! | [`policy`] | the statement that says when nodes may join |
//! | [`token`] | a way to join that ends by itself |
//! | [`tries`] | a member's count of failed tries to join |
//! | [`join`] | the key file and its proofs |
//! | [`password`] | the password mode: OPAQUE with Argon2id |
//! | [`channel`] | what a control session must offer, and the secrets drawn from it |
//! | [`wireguard`] | WireGuard keys and the pre-shared key of a pair |
//! | [`frame`] | the sealed gossip datagram |
//! | [`secret`] | 32 secret bytes |
//! | [`armor`] | one line of text for a key in a file |
//! | [`sorted_map`] | an ordered map in one piece of memory |
//! | [`memo`] | for simulators: the signatures made and found right in a thread |
//!
//! ## Signatures and hashes are separated by purpose
//!
//! Every hash, signature and derived key names its purpose (a *domain*), so that bytes made for one
//! purpose are worthless for another. Domains end in a version; a change of layout takes a new one.
//!
//! ## Randomness
//!
//! Callers pass a `&mut (impl RngCore + CryptoRng)` of `rand_core` 0.6. The daemon passes the
//! operating system's generator, a simulator a seeded one.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests"))]

pub mod admin;
pub mod admission;
pub mod agreement;
pub mod armor;
pub mod channel;
pub mod cluster;
pub mod frame;
mod hexbytes;
pub mod identity;
pub mod join;
pub mod mac1;
pub mod memo;
pub mod password;
pub mod policy;
pub mod removal;
mod replay;
pub mod secret;
pub mod signed;
pub mod sorted_map;
pub mod token;
pub mod tries;
pub mod wireguard;

pub use admin::AdminKey;
pub use admission::{Admission, AdmissionError, JoinMode, SignedAdmission};
pub use agreement::PairSecret;
pub use channel::{ExporterError, SecureChannel, SessionSecrets};
pub use cluster::{ClusterId, Genesis, GenesisError, GenesisFields, JoinModes};
pub use hexbytes::HexError;
pub use identity::{BadSignature, Identity, IdentityKey, NodeId, Signature};
pub use join::{JoinKey, JoinProof, WrongJoinKey};
pub use policy::{JoinPolicy, JoinWindow, SignedJoinPolicy, StatementError};
pub use removal::{Removal, RemovalError, SignedRemoval};
pub use secret::Secret32;
pub use signed::{BodyId, Signable, Signed, SignedError};
pub use token::{JoinToken, Revocation, SignedRevocation, SignedToken, Token, TokenId};
pub use tries::Tries;
pub use wireguard::{PairEnd, Psk, PskCheck, PskStep, WeakWgKey, WgPublic, WgSecret, pair_psk, psk_check};

pub use rand_core;
