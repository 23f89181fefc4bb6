//! Documents of the control API, and the names by which plugin and daemon find the same attachment.

use std::fmt::Debug;
use std::net::Ipv4Addr;

use mesh_core::api::{
    AddressStatus, ApiError, AttachRequest, Attachment, AttachmentId, AttachmentState, Backend,
    ClusterStatus, ConflictStatus, DIAGNOSIS_SCHEMA_VERSION, Direction, DoctorReport, EndStatus, ErrorCode,
    Finding, GcReport, GcRequest, GossipStatus, IpamStatus, JoinWindowRequest, JoinWindowStatus, LaneStatus,
    LeaveStatus, Level, MacAddr, Membership, NetnsId, NewToken, NodeName, NodeStatus, OwnerStatus,
    PeerStatus, Pinged, PodIdentity, PortFailure, Protocol, RemovalPlan, RemovalRequest, RevocationRequest,
    SessionStatus, Status, Subject, TokenList, TokenRequest, TokenStatus, Tombstone, TunnelStatus,
    UsageStatus, Verdict, WhyReport, WhyRequest,
};
use mesh_keys::token::TokenHash;
use mesh_keys::{BodyId, JoinWindow, TokenId};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::golden_set::{Entry, assert_complete, variants};
use crate::say;
use crate::world::{WORLD, identity, node};

fn json<T>(name: &str, what: &str, value: T) -> Entry
where
    T: Serialize + DeserializeOwned + PartialEq + Debug + 'static,
{
    Entry::text(name, what, &serde_json::to_string(&value).unwrap(), move |text| {
        let read: T = serde_json::from_str(text).map_err(say)?;
        if read != value {
            return Err(format!("expected {value:?}, found {read:?}"));
        }
        serde_json::to_string(&read).map_err(say)
    })
}

variants!(code_name, CODES: ErrorCode {
    ErrorCode::Invalid => "error-invalid",
    ErrorCode::NotFound => "error-not-found",
    ErrorCode::Conflict => "error-conflict",
    ErrorCode::Ambiguous => "error-ambiguous",
    ErrorCode::Forbidden => "error-forbidden",
    ErrorCode::Exhausted => "error-exhausted",
    ErrorCode::NotReady => "error-not-ready",
    ErrorCode::Internal => "error-internal",
    ErrorCode::Unknown => "error-unknown",
});

variants!(state_name, STATES: AttachmentState {
    AttachmentState::Leased => "attachment-leased",
    AttachmentState::Active => "attachment-active",
});

variants!(removal_name, REMOVALS: RemovalRequest {
    RemovalRequest::Node(_) => "removal-node",
    RemovalRequest::Signed { .. } => "removal-signed",
});

variants!(window_name, WINDOWS: JoinWindowRequest {
    JoinWindowRequest::Set(JoinWindow::Open) => "window-open",
    JoinWindowRequest::Set(JoinWindow::Closed) => "window-closed",
    JoinWindowRequest::Set(JoinWindow::Until(_)) => "window-until",
    JoinWindowRequest::Signed(_) => "window-signed",
});

variants!(token_name, TOKENS: TokenRequest {
    TokenRequest::New(_) => "token-new",
    TokenRequest::Signed(_) => "token-signed",
});

variants!(revocation_name, REVOCATIONS: RevocationRequest {
    RevocationRequest::Id(_) => "revocation-id",
    RevocationRequest::Signed(_) => "revocation-signed",
});

pub(crate) fn entries() -> Vec<Entry> {
    let mut entries = attachments();
    entries.extend(authority());
    entries.extend(diagnoses());
    entries.push(json("status-member", "answer of GET /v1/status, of a member", status()));
    let mut leaving = status();
    leaving.leave = Some(LeaveStatus::Leaving { waiting_for: "its last addresses to rest".to_owned() });
    for (peer, is_leaving) in leaving.peers.iter_mut().zip([true, false]) {
        peer.leaving = is_leaving;
        peer.session = SessionStatus::Carried { through: "19".repeat(16), since_seconds: 15 };
    }
    entries.push(json("status-leaving", "likewise, of one that leaves the cluster", leaving));
    let waiting_for = "a seed that answers".to_owned();
    let alone = Status {
        cluster: None,
        membership: Membership::Joining { waiting_for },
        addresses: None,
        lanes: Vec::new(),
        peers: Vec::new(),
        ipam: None,
        ..status()
    };
    entries.push(json("status-joining", "answer of GET /v1/status, of a node without cluster", alone));
    let codes = [
        ErrorCode::Invalid,
        ErrorCode::NotFound,
        ErrorCode::Conflict,
        ErrorCode::Ambiguous,
        ErrorCode::Forbidden,
        ErrorCode::Exhausted,
        ErrorCode::NotReady,
        ErrorCode::Internal,
        ErrorCode::Unknown,
    ];
    assert_complete(CODES, codes.iter().map(code_name));
    for code in codes {
        entries.push(json(code_name(&code), "answer to what failed", ApiError::new(code, "what it is")));
    }
    entries
}

fn diagnoses() -> Vec<Entry> {
    let text = str::to_owned;
    let name = |byte, this_node| NodeName { id: node(byte).to_string(), name: format!("h{byte}"), this_node };
    let found = |about, level, direction| Finding {
        about,
        level,
        text: text("what it is"),
        advice: Some(text("what to do")),
        failure: Some(PortFailure {
            protocol: Protocol::Udp,
            port: 6784,
            lane: Some(0),
            direction,
            addresses: vec!["192.0.2.7:6784".parse().unwrap()],
        }),
        members: vec![node(2).to_string()],
    };
    let bare = |about, level| Finding {
        advice: None,
        failure: None,
        members: Vec::new(),
        ..found(about, level, Direction::Both)
    };
    let tcp = Finding {
        failure: Some(PortFailure {
            protocol: Protocol::Tcp,
            port: 6783,
            lane: None,
            direction: Direction::ToMember,
            addresses: Vec::new(),
        }),
        ..found(Subject::Session, Level::Problem, Direction::ToMember)
    };
    let why = WhyReport {
        schema_version: DIAGNOSIS_SCHEMA_VERSION,
        source: EndStatus {
            text: text("10.32.0.2"),
            address: "10.32.0.2".parse().ok(),
            node: Some(name(1, true)),
            attachment: Some(text("0f1e-container/eth0")),
        },
        destination: EndStatus {
            text: text("h2"),
            address: None,
            node: Some(name(2, false)),
            attachment: None,
        },
        port: Some(80),
        verdict: Verdict::Stopped,
        summary: text("why"),
        findings: vec![
            bare(Subject::Source, Level::Ok),
            bare(Subject::Policy, Level::Note),
            found(Subject::Tunnel, Level::Problem, Direction::FromMember),
            found(Subject::Gossip, Level::Warning, Direction::Either),
            tcp,
        ],
        ping: "10.32.1.1".parse().ok(),
        look_again_milliseconds: Some(1500),
    };
    let subjects = [
        Subject::Membership,
        Subject::Destination,
        Subject::Host,
        Subject::Engine,
        Subject::Route,
        Subject::Key,
        Subject::Path,
        Subject::Mtu,
        Subject::Members,
        Subject::Nat,
        Subject::Networks,
        Subject::Sysctls,
        Subject::Clock,
        Subject::Cluster,
    ];
    let doctor = DoctorReport {
        schema_version: DIAGNOSIS_SCHEMA_VERSION,
        node: name(1, true),
        level: Level::Warning,
        findings: subjects.into_iter().map(|about| bare(about, Level::Ok)).collect(),
        look_again_milliseconds: None,
    };
    let request = WhyRequest {
        from: text("10.32.0.2"),
        to: text("h2:80"),
        look: true,
        pinged: Some(Pinged::Answered { microseconds: 900 }),
    };
    let unanswered =
        WhyRequest { pinged: Some(Pinged::Unanswered { count: 6 }), look: false, ..request.clone() };
    let elsewhere = WhyReport { verdict: Verdict::AskElsewhere, findings: Vec::new(), ..why.clone() };
    let flows = WhyReport { verdict: Verdict::Flows, findings: Vec::new(), ..why.clone() };
    vec![
        json("why-request", "body of POST /v1/why", request),
        json("why-unanswered", "likewise, after pings that were not answered", unanswered),
        json("why-stopped", "answer of POST /v1/why", why),
        json("why-flows", "likewise, where nothing stops it", flows),
        json("why-elsewhere", "likewise, where neither end is of the host", elsewhere),
        json("doctor", "answer of GET /v1/doctor", doctor),
    ]
}

fn attachments() -> Vec<Entry> {
    let text = str::to_owned;
    let id = AttachmentId::new("0f1e-container", "eth0").unwrap();
    let other = AttachmentId::new("other", "net1").unwrap();
    let pod = PodIdentity { namespace: text("default"), name: text("web-0"), uid: text("uid-7") };
    let request = AttachRequest {
        id: id.clone(),
        netns: text("/run/netns/x"),
        network: text("mesh"),
        pod: Some(pod.clone()),
        netns_id: Some(NetnsId { dev: 4, ino: 4_026_532_000 }),
    };
    let attachment = |state| Attachment {
        id: id.clone(),
        state,
        netns: text("/run/netns/x"),
        network: text("mesh"),
        pod: Some(pod.clone()),
        host_ifname: id.host_ifname(),
        mac: MacAddr([0x0a, 0x58, 10, 32, 0, 2]),
        ipv4: [10, 32, 0, 2].into(),
        ipv6: "fd6d:d126:cb51:a911:310a:cf42:a20:2".parse().unwrap(),
        gateway_ipv4: [10, 32, 0, 1].into(),
        gateway_ipv6: "fd6d:d126:cb51:a911:310a:cf42:a20:1".parse().unwrap(),
        gateway_mac: MacAddr([0x0a, 0x58, 10, 32, 0, 1]),
        cluster_ipv4: "10.32.0.0/12".parse().unwrap(),
        cluster_ipv6: "fd6d:d126:cb51::/48".parse().unwrap(),
        mtu: 1420,
    };
    let names = format!("{} {}", id.host_ifname(), id.tombstone_name());
    let mut entries = vec![
        json("attach", "body of POST /v1/attachments", request.clone()),
        json(
            "attach-bare",
            "the same of a container that is no pod",
            AttachRequest { pod: None, netns_id: None, ..request },
        ),
        json("gc", "body of POST /v1/attachments/gc", {
            GcRequest { network: text("mesh"), valid: vec![id.clone(), other.clone()] }
        }),
        json("gc-report", "answer of POST /v1/attachments/gc", GcReport { released: vec![other] }),
        json("tombstone", "file in /var/lib/meshd/tombstones", Tombstone { id: id.clone() }),
        Entry::text("names", "host's end of the veth pair, and tombstone, of 0f1e-container eth0", &names, {
            let names = names.clone();
            move |_| Ok(names.clone())
        }),
    ];
    let states = [AttachmentState::Leased, AttachmentState::Active];
    assert_complete(STATES, states.iter().map(state_name));
    for state in states {
        entries.push(json(state_name(&state), "answer of POST /v1/attachments", attachment(state)));
    }
    entries
}

fn authority() -> Vec<Entry> {
    let all = WORLD.to_delta();
    let (cluster, admin) = (WORLD.cluster(), identity(9).public());
    let id = TokenId::from_bytes([1, 2, 3, 4]);
    let joins = JoinWindowStatus {
        cluster,
        admin_keys: vec![admin],
        window: JoinWindow::Until(1_700_000_000),
        open: true,
        signer: Some(admin),
        next_serial: 10,
    };
    let plan = RemovalPlan {
        cluster,
        admin_keys: vec![admin],
        node: node(2),
        name: Some("node-2".to_owned()),
        this_node: true,
        alive: Some("it answered 3 s ago".to_owned()),
        knows_join_secret: true,
        subject: identity(2).public(),
        heir: identity(1).public(),
        keep: vec![node(4)],
        grants: vec![BodyId::from_bytes([0x19; 32])],
        joins: joins.clone(),
    };
    let token = TokenStatus {
        id,
        expires: 1_700_000_001,
        uses: 300,
        used: 299,
        refused: Some("the token was revoked".to_owned()),
        signer: admin,
    };
    let removals = [
        RemovalRequest::Node(node(2)),
        RemovalRequest::Signed { removal: all.removals[0].clone(), policy: Some(all.policies[0].clone()) },
    ];
    let windows = [
        JoinWindowRequest::Set(JoinWindow::Open),
        JoinWindowRequest::Set(JoinWindow::Closed),
        JoinWindowRequest::Set(JoinWindow::Until(1_700_000_000)),
        JoinWindowRequest::Signed(all.policies[0].clone()),
    ];
    let new = NewToken { id, hash: TokenHash::from_bytes([0x40; 32]), expires: 1_700_000_002, uses: 301 };
    let tokens = [TokenRequest::New(new), TokenRequest::Signed(all.tokens[0].clone())];
    let revocations = [RevocationRequest::Id(id), RevocationRequest::Signed(all.revocations[0].clone())];
    assert_complete(REMOVALS, removals.iter().map(removal_name));
    assert_complete(WINDOWS, windows.iter().map(window_name));
    assert_complete(TOKENS, tokens.iter().map(token_name));
    assert_complete(REVOCATIONS, revocations.iter().map(revocation_name));

    let mut entries = vec![
        json("removal-plan", "answer of GET /v1/removals/prepare", plan),
        json("window-status", "answer of GET /v1/join-window", joins),
        json("token-list", "answer of GET /v1/tokens", {
            TokenList { cluster, admin_keys: vec![admin], tokens: vec![token] }
        }),
    ];
    entries.extend(removals.map(|it| json(removal_name(&it), "body of POST /v1/removals", it)));
    entries.extend(windows.map(|it| json(window_name(&it), "body of PUT /v1/join-window", it)));
    entries.extend(tokens.map(|it| json(token_name(&it), "body of POST /v1/tokens", it)));
    entries
        .extend(revocations.map(|it| json(revocation_name(&it), "body of POST /v1/tokens/revocations", it)));
    entries
}

fn status() -> Status {
    let text = str::to_owned;
    let (ipv4, ipv6) = ("10.32.0.0/12".parse().unwrap(), "fd6d:d126:cb51::/48".parse().unwrap());
    let lane = |index: u16, backend| LaneStatus {
        device: format!("meshwg{index}"),
        backend,
        reason: text("why"),
        port: 6784 + index,
        public_key: text("pOCSkrZRwni5dyxWn1+puxPZBrRqtoyd+dwrRAn4ogk="),
        up: index == 0,
    };
    let peer = |byte: u8, session| PeerStatus {
        id: node(byte).to_string(),
        name: format!("node-{byte}"),
        version: text("0.1.0"),
        leaving: false,
        advertised: vec![[192, 0, 2, byte].into()],
        ranges: vec!["10.32.4.0/24".parse().unwrap()],
        mesh_ipv4: Some(Ipv4Addr::new(10, 32, 4, byte)),
        mesh_ipv6: "fd6d:d126:cb51:13eb:8065:d77a:a20:401".parse().unwrap(),
        session,
        gossip: GossipStatus {
            reachable: true,
            address: Some("192.0.2.2:6783".parse().unwrap()),
            rtt_microseconds: Some(20_001),
            heard_seconds: Some(3),
        },
        tunnel: TunnelStatus {
            ready: true,
            endpoint: Some("192.0.2.2:6784".parse().unwrap()),
            handshake_age_seconds: Some(45),
            rx_bytes: 5_000_000_000,
            tx_bytes: 6_000_000_000,
        },
        path: None,
        mtu: None,
    };
    Status {
        schema_version: 1,
        version: text("0.1.0"),
        node: NodeStatus {
            id: node(1).to_string(),
            name: text("node-1"),
            identity_key: identity(1).public().to_string(),
        },
        cluster: Some(ClusterStatus {
            id: WORLD.cluster().to_string(),
            name: text("golden"),
            founder: node(1).to_string(),
            ipv4,
            ipv6,
            members: 3,
            admin_keys: Some(vec![identity(9).public().to_string()]),
            joins_open: Some(true),
        }),
        membership: Membership::Member,
        addresses: Some(AddressStatus {
            ipv4: [10, 32, 0, 1].into(),
            ipv6: "fd6d:d126:cb51:a911:310a:cf42:a20:1".parse().unwrap(),
            owned_ipv4: vec!["10.40.0.0/13".parse().unwrap()],
            owned_ipv6: "fd6d:d126:cb51:a911:310a:cf42::/96".parse().unwrap(),
            leased: 11,
            free: 12,
        }),
        lanes: vec![lane(0, Backend::Userspace), lane(1, Backend::Kernel), lane(2, Backend::Unknown)],
        peers: vec![
            peer(2, SessionStatus::Up { remote: "192.0.2.2:6783".parse().unwrap(), since_seconds: 13 }),
            peer(4, SessionStatus::Down { reason: Some(text("nothing to say")) }),
        ],
        attachments: 14,
        problems: vec![text("a problem")],
        leave: None,
        ipam: Some(IpamStatus {
            ipv4,
            ipv6,
            block_prefix: 24,
            owners: vec![OwnerStatus {
                id: node(1).to_string(),
                name: Some(text("node-1")),
                this_node: true,
                ipv4: vec!["10.40.0.0/13".parse().unwrap()],
                ipv4_addresses: 524_288,
                ipv6: Some("fd6d:d126:cb51:a911:310a:cf42::/96".parse().unwrap()),
            }],
            usage: UsageStatus { usable: 15, own: 1, leased: 2, resting: 3, resting_seconds: 59, free: 9 },
            shortage: Some(text("what would help")),
            conflicts: vec![ConflictStatus {
                granter: node(1).to_string(),
                range: "10.33.0.0/24".parse().unwrap(),
                loser: node(4).to_string(),
            }],
        }),
    }
}
