//! A small daemon: the control API as `meshd` answers it, and the host's side of attachments.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use ipnet::IpNet;
use mesh_core::api::{
    ApiError, AttachRequest, Attachment, AttachmentId, AttachmentState, BRIDGE, ErrorCode, GcReport,
    GcRequest, MacAddr,
};
use mesh_sys::rtnl::{
    AddressSpec, Blocking, BridgePortChange, BridgeSpec, FdbEntry, LinkChange, Mac, Route, RtnlError,
};
use tokio::net::UnixListener;

use super::Namespace;

const GATEWAY_MAC: [u8; 6] = [0x02, 0, 0, 0, 0xff, 1];
const GATEWAY4: Ipv4Addr = Ipv4Addr::new(10, 32, 0, 1);
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xaa, 0, 0, 0, 0, 0, 1);
const PROTOCOL: u8 = 118;

/// The requests that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Ready,
    Attach,
    Activate,
    Detach,
}

/// How a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Refused with this code, nothing is done.
    Refuse(ErrorCode),
    /// Done, but the connection ends before the answer.
    HangUpAfter,
    /// The answer is JSON of another kind.
    Nonsense,
    /// No answer, nothing is done.
    StallBefore,
    /// Done, then no answer.
    StallAfter,
    /// Said to be done, but not done.
    Lie,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Times {
    Once,
    Always,
}

struct Inner {
    rtnl: Blocking,
    bridge: u32,
    leases: BTreeMap<AttachmentId, Attachment>,
    requests: Vec<AttachRequest>,
    next: u8,
    faults: Vec<(Step, Fault, Times)>,
    stalled: bool,
}

#[derive(Clone)]
struct Shared {
    inner: Arc<Mutex<Inner>>,
    stalled: Arc<Condvar>,
}

/// The daemon; its state and its host's side survive [`Daemon::stop`].
pub struct Daemon {
    shared: Shared,
    socket: PathBuf,
    runtime: Option<tokio::runtime::Runtime>,
}

type Answer<T> = Result<Json<T>, (StatusCode, Json<ApiError>)>;

impl Daemon {
    pub fn start(host: &Namespace, socket: PathBuf) -> Self {
        let mut rtnl = host.rtnl();
        let bridge = rtnl
            .create_bridge(BridgeSpec {
                name: BRIDGE.into(),
                mac: Some(Mac(GATEWAY_MAC)),
                mtu: Some(1420),
                multicast_snooping: false,
            })
            .unwrap();
        rtnl.set_link(bridge, LinkChange { up: Some(true), ..LinkChange::default() }).unwrap();
        for gateway in [IpAddr::V4(GATEWAY4), IpAddr::V6(GATEWAY6)] {
            rtnl.add_address(bridge, AddressSpec::plain(IpNet::from(gateway))).unwrap();
        }
        let inner = Inner {
            rtnl,
            bridge,
            leases: BTreeMap::new(),
            requests: Vec::new(),
            next: 2,
            faults: Vec::new(),
            stalled: false,
        };
        let shared = Shared { inner: Arc::new(Mutex::new(inner)), stalled: Arc::new(Condvar::new()) };
        let mut daemon = Self { shared, socket, runtime: None };
        daemon.serve();
        daemon
    }

    /// Starts to answer (again).
    pub fn serve(&mut self) {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let router = Router::new()
            .route("/v1/ready", get(ready))
            .route("/v1/attachments", post(attach).get(list))
            .route("/v1/attachments/gc", post(gc))
            .route("/v1/attachments/{container}/{ifname}", get(attachment).delete(detach))
            .route("/v1/attachments/{container}/{ifname}/activate", post(activate))
            .with_state(self.shared.clone());
        let listener = {
            let _guard = runtime.enter();
            UnixListener::bind(&self.socket).unwrap()
        };
        runtime.spawn(async move { axum::serve(listener, router).await.unwrap() });
        self.runtime = Some(runtime);
    }

    /// Dies, leaving its socket file as a killed process does.
    pub fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(1));
        }
    }

    /// Comes back.
    pub fn restart(&mut self) {
        self.stop();
        std::fs::remove_file(&self.socket).unwrap();
        self.serve();
    }

    /// From now on, this request fails so; several may be set.
    pub fn fail(&self, step: Step, fault: Fault) {
        self.shared.inner.lock().unwrap().faults.push((step, fault, Times::Always));
    }

    /// The next such request fails so.
    pub fn fail_once(&self, step: Step, fault: Fault) {
        self.shared.inner.lock().unwrap().faults.push((step, fault, Times::Once));
    }

    /// Nothing fails any more.
    pub fn heal(&self) {
        let mut inner = self.shared.inner.lock().unwrap();
        inner.faults.clear();
        inner.stalled = false;
    }

    /// Waits until a request stalls.
    pub fn wait_for_stall(&self) {
        let inner = self.shared.inner.lock().unwrap();
        let (_inner, timeout) = self
            .shared
            .stalled
            .wait_timeout_while(inner, Duration::from_secs(10), |inner| !inner.stalled)
            .unwrap();
        assert!(!timeout.timed_out(), "no request stalled");
    }

    pub fn leases(&self) -> Vec<Attachment> {
        self.shared.inner.lock().unwrap().leases.values().cloned().collect()
    }

    /// All requests for a lease so far.
    pub fn requests(&self) -> Vec<AttachRequest> {
        self.shared.inner.lock().unwrap().requests.clone()
    }

    pub fn gateways(&self) -> [IpAddr; 2] {
        [IpAddr::V4(GATEWAY4), IpAddr::V6(GATEWAY6)]
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Inner {
    fn lease(&mut self, request: AttachRequest) -> Result<Attachment, ApiError> {
        self.requests.push(request.clone());
        let host_ifname = request.id.host_ifname();
        let in_kernel = self.rtnl.link(&host_ifname).map_err(|error| internal(&error))?.is_some();
        if let Some(old) = self.leases.get_mut(&request.id) {
            if old.state == AttachmentState::Active && in_kernel {
                return Err(ApiError::new(
                    ErrorCode::Conflict,
                    format!("{} is attached already", request.id),
                ));
            }
            old.state = AttachmentState::Leased;
            return Ok(old.clone());
        }
        let n = self.next;
        self.next += 1;
        let attachment = Attachment {
            id: request.id.clone(),
            state: AttachmentState::Leased,
            netns: request.netns,
            network: request.network,
            pod: request.pod,
            host_ifname,
            mac: MacAddr([0x02, 0, 0, 0, 0, n]),
            ipv4: Ipv4Addr::new(10, 32, 0, n),
            ipv6: Ipv6Addr::new(0xfd00, 0xaa, 0, 0, 0, 0, 0, u16::from(n)),
            gateway_ipv4: GATEWAY4,
            gateway_ipv6: GATEWAY6,
            gateway_mac: MacAddr(GATEWAY_MAC),
            cluster_ipv4: "10.32.0.0/12".parse().unwrap(),
            cluster_ipv6: "fd00:aa::/48".parse().unwrap(),
            mtu: 1420,
        };
        self.leases.insert(request.id, attachment.clone());
        Ok(attachment)
    }

    fn activate(&mut self, id: &AttachmentId) -> Result<Attachment, ApiError> {
        let Some(attachment) = self.leases.get(id).cloned() else { return Err(unknown(id)) };
        if self.faults.contains(&(Step::Activate, Fault::Lie, Times::Always)) {
            return Ok(Attachment { state: AttachmentState::Active, ..attachment });
        }
        self.wire(&attachment).map_err(|error| internal(&error))?;
        let attachment = Attachment { state: AttachmentState::Active, ..attachment };
        self.leases.insert(id.clone(), attachment.clone());
        Ok(attachment)
    }

    fn wire(&mut self, attachment: &Attachment) -> Result<(), RtnlError> {
        let Some(link) = self.rtnl.link(&attachment.host_ifname)? else {
            return Err(RtnlError::BadName {
                name: attachment.host_ifname.clone(),
                reason: "no such device",
            });
        };
        if link.master == Some(self.bridge) {
            return Ok(());
        }
        assert!(!link.up, "the plugin must leave the host's end down");
        let port =
            BridgePortChange { isolated: Some(true), learning: Some(false), ..BridgePortChange::default() };
        self.rtnl
            .set_link(link.index, LinkChange { master: Some(Some(self.bridge)), ..LinkChange::default() })?;
        self.rtnl.set_bridge_port(link.index, port)?;
        let mac = Mac(attachment.mac.0);
        self.rtnl.add_fdb(FdbEntry::on_port(link.index, mac))?;
        for ip in addresses(attachment) {
            self.rtnl.add_route(Route::dev(IpNet::from(ip), self.bridge, PROTOCOL))?;
            self.rtnl.add_neighbour(self.bridge, ip, mac)?;
        }
        self.rtnl.set_link(link.index, LinkChange { up: Some(true), ..LinkChange::default() })
    }

    fn release(&mut self, id: &AttachmentId) -> Result<bool, ApiError> {
        let Some(attachment) = self.leases.remove(id) else { return Ok(false) };
        assert!(
            self.rtnl.link(&attachment.host_ifname).unwrap().is_none(),
            "the plugin must delete the device before the lease"
        );
        for ip in addresses(&attachment) {
            self.rtnl
                .del_route(Route::dev(IpNet::from(ip), self.bridge, PROTOCOL))
                .map_err(|e| internal(&e))?;
            self.rtnl.del_neighbour(self.bridge, ip).map_err(|e| internal(&e))?;
        }
        Ok(true)
    }
}

fn addresses(attachment: &Attachment) -> [IpAddr; 2] {
    [IpAddr::V4(attachment.ipv4), IpAddr::V6(attachment.ipv6)]
}

fn internal(error: &RtnlError) -> ApiError {
    ApiError::new(ErrorCode::Internal, error.to_string())
}

fn unknown(id: &AttachmentId) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("there is no attachment {id}"))
}

impl Shared {
    /// Does the work of a request, or fails as asked for.
    async fn answer<T>(&self, step: Step, work: impl FnOnce(&mut Inner) -> Result<T, ApiError>) -> Answer<T> {
        let fault = {
            let mut inner = self.inner.lock().unwrap();
            let found = inner.faults.iter().position(|(at, ..)| *at == step);
            found.map(|i| match inner.faults[i] {
                (_, fault, Times::Once) => {
                    inner.faults.remove(i);
                    fault
                }
                (_, fault, Times::Always) => fault,
            })
        };
        match fault {
            None | Some(Fault::Lie) => self.work(work),
            Some(Fault::Refuse(code)) => refuse(ApiError::new(code, format!("{step:?} fails on purpose"))),
            Some(Fault::Nonsense) => refuse_with_status(StatusCode::IM_A_TEAPOT, ErrorCode::Unknown),
            Some(Fault::HangUpAfter) => {
                let _ = self.work(work);
                // Ends the connection's task, and prints nothing.
                std::panic::resume_unwind(Box::new("hang up"))
            }
            Some(Fault::StallBefore) => self.stall().await,
            Some(Fault::StallAfter) => {
                let _ = self.work(work);
                self.stall().await
            }
        }
    }

    fn work<T>(&self, work: impl FnOnce(&mut Inner) -> Result<T, ApiError>) -> Answer<T> {
        match work(&mut self.inner.lock().unwrap()) {
            Ok(value) => Ok(Json(value)),
            Err(error) => refuse(error),
        }
    }

    async fn stall<T>(&self) -> Answer<T> {
        self.inner.lock().unwrap().stalled = true;
        self.stalled.notify_all();
        std::future::pending().await
    }
}

fn refuse<T>(error: ApiError) -> Answer<T> {
    let status = StatusCode::from_u16(error.code.http_status()).unwrap();
    Err((status, Json(error)))
}

fn refuse_with_status<T>(status: StatusCode, code: ErrorCode) -> Answer<T> {
    Err((status, Json(ApiError::new(code, "short and stout"))))
}

fn id(parts: (String, String)) -> Result<AttachmentId, (StatusCode, Json<ApiError>)> {
    AttachmentId::new(parts.0, parts.1).map_err(|error| {
        (StatusCode::BAD_REQUEST, Json(ApiError::new(ErrorCode::Invalid, error.to_string())))
    })
}

async fn ready(State(shared): State<Shared>) -> Answer<()> {
    shared.answer(Step::Ready, |_| Ok(())).await
}

async fn attach(State(shared): State<Shared>, Json(request): Json<AttachRequest>) -> Answer<Attachment> {
    shared.answer(Step::Attach, |inner| inner.lease(request)).await
}

async fn list(State(shared): State<Shared>) -> Json<Vec<Attachment>> {
    Json(shared.inner.lock().unwrap().leases.values().cloned().collect())
}

async fn attachment(State(shared): State<Shared>, Path(parts): Path<(String, String)>) -> Answer<Attachment> {
    let id = id(parts)?;
    let known = shared.inner.lock().unwrap().leases.get(&id).cloned();
    known.map_or_else(|| refuse(unknown(&id)), |known| Ok(Json(known)))
}

async fn activate(State(shared): State<Shared>, Path(parts): Path<(String, String)>) -> Answer<Attachment> {
    let id = id(parts)?;
    shared.answer(Step::Activate, |inner| inner.activate(&id)).await
}

async fn detach(
    State(shared): State<Shared>,
    Path(parts): Path<(String, String)>,
) -> Result<StatusCode, (StatusCode, Json<ApiError>)> {
    let id = id(parts)?;
    shared.answer(Step::Detach, |inner| inner.release(&id)).await.map(|_| StatusCode::NO_CONTENT)
}

async fn gc(State(shared): State<Shared>, Json(request): Json<GcRequest>) -> Answer<GcReport> {
    shared.work(|inner| {
        let stale: Vec<AttachmentId> = inner
            .leases
            .values()
            .filter(|lease| lease.network == request.network && !request.valid.contains(&lease.id))
            .map(|lease| lease.id.clone())
            .collect();
        for id in &stale {
            inner.release(id)?;
        }
        Ok(GcReport { released: stale })
    })
}
