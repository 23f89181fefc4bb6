//! What two nodes say to each other on a control session.
//!
//! Each frame of a session is one [`Message`] in postcard. The end that dialled speaks first:
//!
//! ```text
//! between members             a node that joins by key          a node that joins by password
//! D → A  Hello::Member        J → S  Hello::Joiner              J → S  Hello::Joiner
//! D ← A  Hello::Member        J ← S  JoinOffer                  J ← S  JoinOffer
//! then GroupKeys, Gossip,     J → S  JoinKey                    J → S  JoinPassword
//! Push, Psk… in any order     J ← S  JoinKeyOk                  J ← S  JoinPasswordAnswer
//!                             J → S  JoinAsk                    J → S  JoinPasswordFinish
//!                             J ← S  Welcome                    J ← S  JoinPasswordOk, then JoinAsk, Welcome
//!                             then as between members           then as between members
//! ```
//!
//! A node that joins by a token has the sponsor prove itself first, and needs no offer:
//!
//! ```text
//! J → S  Hello::Joiner    J ← S  JoinOffer       J → S  TokenAsk      J ← S  TokenProof
//! J → S  JoinToken        J ← S  JoinTokenOk     J → S  JoinAsk, and on as above
//! ```
//!
//! A view that is too long for one frame comes before the welcome in parts, each of which the joiner answers:
//!
//! ```text
//! J ← S  WelcomePart      J → S  WelcomeNext      … and at last Welcome
//! ```
//!
//! Either end may send [`Message::Refuse`] at any point before it takes the other for a member; the session
//! ends then, and both say why. Nothing of the cluster is said to an end that has not proved that it belongs
//! to it, but that there is one; and to an end that knows half of the cluster id, as every token says it, the
//! genesis document and the sponsor's own admissions.

use std::net::IpAddr;

use mesh_keys::join::JoinProof;
use mesh_keys::password::{PasswordFinalization, PasswordRequest, PasswordResponse};
use mesh_keys::secret::Secret32;
use mesh_keys::token::{ClusterPrefix, TokenSecret};
use mesh_keys::{ClusterId, NodeId, PskCheck, Signed, SignedAdmission, TokenId, WgPublic};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::gossip::catalogue::Name;
use crate::view::{Delta, NodeRecord};
use crate::wiped;

/// Version of the protocol between nodes. Whether two versions fit is for the newer one to judge: see
/// [`OLDEST_PROTOCOL`].
pub const PROTOCOL: u16 = 3;

/// The oldest protocol that this version speaks with; older ones are refused with [`RefusalCode::Version`].
pub const OLDEST_PROTOCOL: u16 = 3;

/// One frame of a control session. Variants are only ever appended, and fields to the end of a variant.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Message {
    /// Who speaks: the first message of the end that dialled, and a member's answer to a member.
    Hello(Box<Hello>),
    /// The session ends.
    Refuse(Refusal),
    /// There is a cluster here; these are the ways to join it.
    JoinOffer {
        /// By key file.
        key: bool,
        /// By password.
        password: bool,
    },
    /// The joiner holds the key file.
    JoinKey {
        /// Bound to this session.
        proof: JoinProof,
    },
    /// So does the sponsor.
    JoinKeyOk {
        /// Bound to this session.
        proof: JoinProof,
    },
    /// First message of OPAQUE.
    JoinPassword {
        /// From the joiner.
        request: PasswordRequest,
    },
    /// Second message of OPAQUE.
    JoinPasswordAnswer {
        /// From the sponsor.
        response: Box<PasswordResponse>,
    },
    /// Third message of OPAQUE.
    JoinPasswordFinish {
        /// From the joiner.
        finalization: PasswordFinalization,
    },
    /// The sponsor accepts the password.
    JoinPasswordOk,
    /// Both have proved themselves: the joiner asks to be let in.
    JoinAsk,
    /// The sponsor lets it in.
    Welcome {
        /// The genesis document.
        genesis: Vec<u8>,
        /// The sponsor's whole view, the joiner's admission and a first grant among it, but for what came before
        /// as [`Message::WelcomePart`].
        view: Delta,
    },
    /// A payload of gossip, as in a datagram: while none is known to arrive.
    Gossip {
        /// The payload.
        payload: Vec<u8>,
    },
    /// The keys of the group, from a member to a member.
    GroupKeys {
        /// All that the sender has.
        keys: Vec<GroupKeyShare>,
    },
    /// Send these: they do not fit into a datagram. Answered with [`Message::Push`].
    Want {
        /// Their names.
        names: Vec<Name>,
    },
    /// Parts of the sender's view.
    Push {
        /// To be merged.
        delta: Delta,
    },
    /// Which record of the receiver is the newest that the sender knows. First words of a session between members.
    YourRecord {
        /// Its generation.
        generation: u64,
        /// Which start of that generation.
        start: u64,
    },
    /// The sender has hardly any address left and asks for a range.
    GrantAsk,
    /// Do we hold the same pre-shared key? From the node with the lower id. All checks are
    /// [`psk_check`](mesh_keys::psk_check)s of the sender.
    PskProbe {
        /// The two tunnel keys it is for, the sender's first.
        keys: (WgPublic, WgPublic),
        /// Number of this agreement, at random.
        epoch: u64,
        /// For the key that the sender holds, if any.
        check: Option<PskCheck>,
    },
    /// The answer; with neither check nor probe: a request for one.
    PskAnswer {
        /// As in the probe.
        epoch: u64,
        /// For the key that both hold; absent if they do not.
        check: Option<PskCheck>,
    },
    /// Use the key of this session and epoch.
    PskOffer {
        /// The two tunnel keys it is for, the sender's first.
        keys: (WgPublic, WgPublic),
        /// As in the probe; distinguishes the keys of one session.
        epoch: u64,
        /// For that key.
        check: PskCheck,
    },
    /// The key is installed; the sender answers handshakes, and starts none yet.
    PskStaged {
        /// As in the offer.
        epoch: u64,
        /// For that key.
        check: PskCheck,
    },
    /// The key is installed here too: traffic may flow.
    PskCommit {
        /// As in the offer.
        epoch: u64,
        /// For that key.
        check: PskCheck,
    },
    /// A part of the view that the [`Message::Welcome`] after it completes: a long history takes several frames. Each
    /// is answered with [`Message::WelcomeNext`], and few are on their way at a time.
    WelcomePart {
        /// In the order of [`Delta::chunks`].
        view: Delta,
    },
    /// The joiner has a token for this cluster: the sponsor shall prove that it is a member of it.
    TokenAsk {
        /// From the token.
        cluster: ClusterPrefix,
    },
    /// It is: the id follows from the document, and the admissions lead to the key that the session is with.
    TokenProof {
        /// The genesis document.
        genesis: Vec<u8>,
        /// The sponsor's admissions, the founder's first.
        chain: Vec<SignedAdmission>,
    },
    /// The joiner's token.
    JoinToken {
        /// Its name.
        id: TokenId,
        /// Its secret.
        secret: TokenSecret,
    },
    /// The sponsor accepts it.
    JoinTokenOk,
    /// A [`Message::WelcomePart`] has arrived: the next may come.
    WelcomeNext,
    /// Carry a connection to that member, by way of this session.
    Call {
        /// What it is called from now on. The node with the lower id begins even ones, the other odd ones.
        link: u32,
        /// Whom it is for.
        to: NodeId,
    },
    /// A member calls by way of this session.
    Called {
        /// As in [`Message::Call`].
        link: u32,
        /// Who it says that it is; the session inside proves it.
        from: NodeId,
    },
    /// Bytes of such a connection, which the carrier does not understand.
    Carry {
        /// Which connection.
        link: u32,
        /// 1 to [`PIECE`](crate::node::PIECE) bytes, and no more than [`WINDOW`](crate::node::WINDOW) on their way.
        bytes: Vec<u8>,
    },
    /// The end of such a connection has used up bytes that it got: as many more may come.
    Taken {
        /// Which connection.
        link: u32,
        /// How many.
        bytes: u32,
    },
    /// Such a connection has ended, or does not come about.
    HangUp {
        /// Which one.
        link: u32,
        /// A sentence for people.
        reason: String,
    },
    /// Where this session seems to come from: behind a NAT the receiver does not know that itself.
    Seen {
        /// The address.
        address: IpAddr,
    },
}

/// Who speaks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Hello {
    /// A node that is in no cluster and wants to join.
    Joiner {
        /// [`PROTOCOL`] of the sender.
        protocol: u16,
        /// Its label.
        name: String,
    },
    /// A member.
    Member {
        /// [`PROTOCOL`] of the sender.
        protocol: u16,
        /// Its cluster.
        cluster: ClusterId,
        /// The admissions that show it to be a member, the founder's first.
        chain: Vec<SignedAdmission>,
        /// What it says of itself.
        record: Box<Signed<NodeRecord>>,
    },
}

/// A key of the group, on its way to another member or to disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupKeyShare {
    /// Counts the keys of the group.
    pub epoch: u64,
    /// The key.
    #[serde(with = "mesh_keys::secret::exposed")]
    pub secret: Secret32,
}

/// Why a session ends before it began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// For programs.
    pub code: RefusalCode,
    /// For people: one sentence, at most [`Refusal::MAX_REASON`] bytes.
    pub reason: String,
}

impl Refusal {
    /// Longest reason, in bytes; a longer one is cut when it is shown.
    pub const MAX_REASON: usize = 300;

    /// A refusal with its sentence.
    pub fn new(code: RefusalCode, reason: impl Into<String>) -> Self {
        Self { code, reason: reason.into() }
    }

    /// The reason, fit for a log line whoever wrote it.
    pub fn printable_reason(&self) -> String {
        self.reason.chars().filter(|c| !c.is_control()).take(Self::MAX_REASON).collect()
    }
}

/// The kinds of refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalCode {
    /// The protocol versions do not fit.
    Version,
    /// The node that was dialled is in no cluster yet; try again.
    NoCluster,
    /// The two are members of different clusters.
    OtherCluster,
    /// The sender's admissions do not lead to the founder.
    NotMember,
    /// The join key is wrong.
    WrongKey,
    /// The password is wrong.
    WrongPassword,
    /// The sponsor has no secret of the kind that the joiner has.
    WrongMethod,
    /// The joiner's identity is a member's already.
    Known,
    /// The sponsor takes no more joins at the moment; try again.
    Busy,
    /// A message that does not belong there, or is malformed.
    Protocol,
    /// The node was removed from the cluster.
    Removed,
    /// Joining by key file or password is closed at present; the operator can open it.
    JoinsClosed,
    /// The token lets nobody in: unknown, revoked, expired or used up.
    BadToken,
    /// A code of a newer version: the sentence beside it says what it is. Those that are added come before it.
    #[serde(other)]
    Unknown,
}

impl Message {
    /// How many variants there are: their numbers on the wire are below it.
    pub const VARIANTS: u32 = 34;

    /// Reads one frame. Bytes behind it are the fields of a newer version.
    ///
    /// # Errors
    /// [`MalformedMessage`]; nothing of it may be used.
    pub fn decode(frame: &[u8]) -> Result<Self, MalformedMessage> {
        let (variant, _) = postcard::take_from_bytes(frame).map_err(MalformedMessage::Decode)?;
        if variant >= Self::VARIANTS {
            return Err(MalformedMessage::Unknown { variant });
        }
        let (message, _newer_fields) = postcard::take_from_bytes(frame).map_err(MalformedMessage::Decode)?;
        Ok(message)
    }

    /// Writes one frame.
    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        // Fails only for types that postcard cannot express; none is used here, and a test encodes every variant.
        wiped::encode(self)
    }

    /// Name of the variant, for log lines.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::Refuse(_) => "refusal",
            Self::JoinOffer { .. } => "join offer",
            Self::JoinKey { .. } | Self::JoinKeyOk { .. } => "key proof",
            Self::JoinPassword { .. }
            | Self::JoinPasswordAnswer { .. }
            | Self::JoinPasswordFinish { .. }
            | Self::JoinPasswordOk => "password proof",
            Self::TokenAsk { .. } | Self::TokenProof { .. } | Self::JoinToken { .. } | Self::JoinTokenOk => {
                "token"
            }
            Self::JoinAsk => "join request",
            Self::Welcome { .. } | Self::WelcomePart { .. } | Self::WelcomeNext => "welcome",
            Self::Gossip { .. } => "gossip payload",
            Self::GroupKeys { .. } => "group key",
            Self::Want { .. } => "request for items",
            Self::Push { .. } => "push",
            Self::Call { .. } | Self::Called { .. } | Self::HangUp { .. } => "call through a member",
            Self::Carry { .. } | Self::Taken { .. } => "carried bytes",
            Self::YourRecord { .. } | Self::Seen { .. } => "account of the receiver",
            Self::GrantAsk => "request for addresses",
            Self::PskProbe { .. }
            | Self::PskAnswer { .. }
            | Self::PskOffer { .. }
            | Self::PskStaged { .. }
            | Self::PskCommit { .. } => "pre-shared key agreement",
        }
    }
}

/// A frame that is no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MalformedMessage {
    /// The decoder stopped.
    #[error("cannot be decoded: {0}")]
    Decode(postcard::Error),
    /// A message that only a newer version knows.
    #[error("message {variant} is one of a newer version")]
    Unknown {
        /// Its number.
        variant: u32,
    },
}
