//! The control API of `meshd`: the JSON documents that `mesh-cni`, `meshctl` and other local programs
//! exchange with the daemon over HTTP on its unix socket.
//!
//! | method and path | body | answer |
//! |---|---|---|
//! | `GET /v1/status` | – | [`Status`] |
//! | `GET /v1/ready` | – | 200 when an attach can be served, else 503 with [`ApiError`] |
//! | `POST /v1/why` | [`WhyRequest`] | [`WhyReport`] |
//! | `GET /v1/doctor?look=true` | – | [`DoctorReport`]; `look`: members that were not heard of late are probed |
//! | `GET /v1/config` | – | the merged configuration, without secrets |
//! | `POST /v1/attachments` | [`AttachRequest`] | [`Attachment`] in state [`AttachmentState::Leased`] |
//! | `POST /v1/attachments/{container}/{ifname}/activate` | – | [`Attachment`] in state [`AttachmentState::Active`] |
//! | `GET /v1/attachments` | – | list of [`Attachment`] |
//! | `GET /v1/attachments/{container}/{ifname}` | – | [`Attachment`], or 404 |
//! | `DELETE /v1/attachments/{container}/{ifname}` | – | 204, also when there is none |
//! | `POST /v1/attachments/gc` | [`GcRequest`] | [`GcReport`] |
//! | `GET /v1/removals/prepare?node=…` | – | [`RemovalPlan`]; the node is an id, its first 8 or more digits, or a name |
//! | `POST /v1/removals` | [`RemovalRequest`] | 204 once it is durable |
//! | `POST /v1/leave` | – | 204 once it is durable that this node leaves the cluster; the status says how far it is |
//! | `DELETE /v1/leave` | – | 204 once it is durable that it stays after all |
//! | `GET /v1/join-window` | – | [`JoinWindowStatus`] |
//! | `PUT /v1/join-window` | [`JoinWindowRequest`] | 204 once it is durable |
//! | `GET /v1/tokens` | – | [`TokenList`] |
//! | `POST /v1/tokens` | [`TokenRequest`] | 204 once it is durable |
//! | `POST /v1/tokens/revocations` | [`RevocationRequest`] | 204 once it is durable |
//!
//! Every error answer carries an [`ApiError`]. Unknown fields are ignored, so that an older plugin can talk
//! to a newer daemon and the other way round.

mod attach;
mod authority;
mod diagnosis;
mod error;
mod status;

pub use attach::{
    AttachRequest, Attachment, AttachmentId, AttachmentState, GcReport, GcRequest, InvalidAttachmentId,
    MacAddr, NetnsId, ParseMacError, PodIdentity, Tombstone,
};
pub use authority::{
    JoinWindowRequest, JoinWindowStatus, NewToken, RemovalPlan, RemovalRequest, RevocationRequest, TokenList,
    TokenRequest, TokenStatus,
};
pub use diagnosis::{
    DIAGNOSIS_SCHEMA_VERSION, Direction, DoctorReport, EndStatus, Finding, Level, NodeName, Pinged,
    PortFailure, Protocol, Subject, Verdict, WhyReport, WhyRequest,
};
pub use error::{ApiError, ErrorCode};
pub use status::{
    AddressStatus, Backend, ClusterStatus, ConflictStatus, GossipStatus, IpamStatus, LaneStatus, LeaveStatus,
    Membership, MtuStatus, NodeStatus, OwnerStatus, PathStatus, PeerStatus, SessionStatus, Status,
    TunnelStatus, UsageStatus, WayStatus,
};

/// Where the control socket of the daemon is, unless configured otherwise.
pub const DEFAULT_SOCKET: &str = "/run/meshd/meshd.sock";

/// Where the daemon keeps its state, unless configured otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/meshd";

/// Below the state directory: one file for each attachment that was deleted while the daemon was away.
pub const TOMBSTONE_DIR: &str = "tombstones";

/// Directory of the control socket and the heartbeat, unless configured otherwise.
pub const DEFAULT_RUN_DIR: &str = "/run/meshd";

/// Below the run directory: a file whose modification time says when the daemon last could serve an attach.
/// The daemon touches it every few seconds, and only while it can.
pub const HEARTBEAT_FILE: &str = "heartbeat";

/// How old the heartbeat may be for the plugin to believe that an absent daemon is only restarting.
pub const HEARTBEAT_GRACE: std::time::Duration = std::time::Duration::from_secs(30);

/// The bridge that pods are attached to.
pub const BRIDGE: &str = "mesh0";

/// Schema of [`Status`] and its parts; raised when a field changes its meaning or goes away.
pub const SCHEMA_VERSION: u32 = 1;
