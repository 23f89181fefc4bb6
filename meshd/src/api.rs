//! The control API: HTTP/JSON on a unix socket that only root may use (see [`mesh_core::api`]).

use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use axum::Router;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Json, Path as UrlPath, State};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response as HttpResponse};
use axum::routing::{get, post};
use mesh_core::api::{
    ApiError, AttachRequest, AttachmentId, DEFAULT_SOCKET, ErrorCode, GcRequest, JoinWindowRequest,
    RemovalRequest, RevocationRequest, TokenRequest, WhyRequest,
};
use mesh_core::node::{Request, Response};
use mesh_core::view::Delta;
use mesh_sys::files::{self, Ours};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::config::Config;
use crate::daemon::Call;
use crate::dataplane::changed_settings;

/// Makes the socket. A stale one of a dead daemon is replaced.
///
/// # Errors
/// A living daemon has it, or the directory cannot be used.
pub fn bind(path: &Path) -> Result<UnixListener> {
    if let Some(dir) = path.parent() {
        let ours =
            if Some(dir) == Path::new(DEFAULT_SOCKET).parent() { Ours::Known } else { Ours::WhenEmpty };
        files::secure_dir(dir, 0o755, ours)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            bail!("{} is there and is no socket: it is left as it is; give another path", path.display());
        }
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => bail!("another meshd answers on {}", path.display()),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).with_context(|| format!("removing the stale {}", path.display()))?;
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).with_context(|| path.display().to_string())?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| path.display().to_string())?;
    Ok(listener)
}

#[derive(Clone)]
struct Api {
    calls: mpsc::Sender<Call>,
    config: Arc<Config>,
}

/// Serves the API for ever.
pub async fn serve(listener: UnixListener, calls: mpsc::Sender<Call>, config: Arc<Config>) {
    let routes = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/why", post(why))
        .route("/v1/doctor", get(doctor))
        .route("/v1/ready", get(ready))
        .route("/v1/config", get(configuration))
        .route("/v1/removals", post(remove))
        .route("/v1/removals/prepare", get(prepare_removal))
        .route("/v1/leave", post(leave).delete(stay))
        .route("/v1/join-window", get(join_window).put(set_join_window))
        .route("/v1/tokens", get(tokens).post(create_token))
        .route("/v1/tokens/revocations", post(revoke_token))
        .route("/v1/attachments", get(list).post(attach))
        .route("/v1/attachments/gc", post(gc))
        .route("/v1/attachments/{container}/{ifname}", get(show).delete(detach))
        .route("/v1/attachments/{container}/{ifname}/activate", post(activate))
        .fallback(unknown)
        .with_state(Api { calls, config });
    if let Err(error) = axum::serve(RootOnly(listener), routes).await {
        tracing::error!(%error, "the control API ended");
    }
}

/// A listener that takes connections of root and of the daemon's own user only.
struct RootOnly(UnixListener);

impl axum::serve::Listener for RootOnly {
    type Io = UnixStream;
    type Addr = PathBuf;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            match self.0.accept().await {
                Ok((stream, _)) => match stream.peer_cred() {
                    Ok(cred) if cred.uid() == 0 || cred.uid() == nix::unistd::geteuid().as_raw() => {
                        return (stream, PathBuf::new());
                    }
                    Ok(cred) => {
                        tracing::warn!(uid = cred.uid(), "a user without the right used the control socket")
                    }
                    Err(error) => tracing::warn!(%error, "the user of a control connection is not known"),
                },
                Err(error) => {
                    tracing::warn!(%error, "a control connection could not be accepted");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        Ok(PathBuf::new())
    }
}

/// Asks the node.
///
/// # Errors
/// The node's own, or that it is gone.
pub async fn call(calls: &mpsc::Sender<Call>, request: Request) -> Result<Response, ApiError> {
    let gone = || ApiError::new(ErrorCode::Internal, "the daemon is stopping");
    let (answer, answered) = oneshot::channel();
    calls.send(Call { request, answer }).await.map_err(|_| gone())?;
    answered.await.map_err(|_| gone())?
}

fn failed(error: ApiError) -> HttpResponse {
    let status = StatusCode::from_u16(error.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, Json(error)).into_response()
}

async fn answer(api: &Api, request: Request) -> HttpResponse {
    match call(&api.calls, request).await {
        Ok(Response::Done) => StatusCode::NO_CONTENT.into_response(),
        Ok(Response::Status(status)) => Json(status).into_response(),
        Ok(Response::Why(report)) => Json(report).into_response(),
        Ok(Response::Doctor(report)) => Json(report).into_response(),
        Ok(Response::Attachment(attachment)) => Json(attachment).into_response(),
        Ok(Response::Attachments(attachments)) => Json(attachments).into_response(),
        Ok(Response::Gc(report)) => Json(report).into_response(),
        Ok(Response::RemovalPlan(plan)) => Json(plan).into_response(),
        Ok(Response::JoinWindow(window)) => Json(window).into_response(),
        Ok(Response::Tokens(tokens)) => Json(tokens).into_response(),
        Err(error) => failed(error),
    }
}

fn id(container: String, ifname: String) -> Result<AttachmentId, Box<HttpResponse>> {
    AttachmentId::new(container, ifname)
        .map_err(|error| Box::new(failed(ApiError::new(ErrorCode::Invalid, error.to_string()))))
}

fn body<T>(body: Result<Json<T>, JsonRejection>) -> Result<T, Box<HttpResponse>> {
    match body {
        Ok(Json(body)) => Ok(body),
        Err(error) => Err(Box::new(failed(ApiError::new(ErrorCode::Invalid, error.body_text())))),
    }
}

async fn status(State(api): State<Api>) -> HttpResponse {
    answer(&api, Request::Status).await
}

async fn why(State(api): State<Api>, request: Result<Json<WhyRequest>, JsonRejection>) -> HttpResponse {
    match body(request) {
        Ok(request) => answer(&api, Request::Why(request)).await,
        Err(refusal) => *refusal,
    }
}

async fn doctor(State(api): State<Api>, uri: Uri) -> HttpResponse {
    let look = match parameter(&uri, "look").as_deref() {
        None | Some("false") => false,
        Some("true") => true,
        Some(other) => {
            let message = format!("field look: {other:?} is neither true nor false");
            return failed(ApiError::new(ErrorCode::Invalid, message));
        }
    };
    let state_dir = api.config.state_dir.clone();
    let settings = tokio::task::spawn_blocking(move || changed_settings(&state_dir)).await;
    let settings = settings.unwrap_or_else(|error| Err(error.to_string()));
    answer(&api, Request::Doctor { look, settings }).await
}

async fn ready(State(api): State<Api>) -> HttpResponse {
    match call(&api.calls, Request::Ready).await {
        Ok(_) => StatusCode::OK.into_response(),
        Err(error) => failed(error),
    }
}

async fn configuration(State(api): State<Api>) -> HttpResponse {
    Json(&*api.config).into_response()
}

async fn list(State(api): State<Api>) -> HttpResponse {
    answer(&api, Request::List).await
}

async fn attach(State(api): State<Api>, request: Result<Json<AttachRequest>, JsonRejection>) -> HttpResponse {
    match body(request) {
        Ok(request) => answer(&api, Request::Attach(request)).await,
        Err(refusal) => *refusal,
    }
}

async fn gc(State(api): State<Api>, request: Result<Json<GcRequest>, JsonRejection>) -> HttpResponse {
    match body(request) {
        Ok(request) => answer(&api, Request::Gc(request)).await,
        Err(refusal) => *refusal,
    }
}

async fn show(
    State(api): State<Api>,
    UrlPath((container, ifname)): UrlPath<(String, String)>,
) -> HttpResponse {
    match id(container, ifname) {
        Ok(id) => answer(&api, Request::Get(id)).await,
        Err(refusal) => *refusal,
    }
}

async fn detach(
    State(api): State<Api>,
    UrlPath((container, ifname)): UrlPath<(String, String)>,
) -> HttpResponse {
    match id(container, ifname) {
        Ok(id) => answer(&api, Request::Detach(id)).await,
        Err(refusal) => *refusal,
    }
}

async fn activate(
    State(api): State<Api>,
    UrlPath((container, ifname)): UrlPath<(String, String)>,
) -> HttpResponse {
    match id(container, ifname) {
        Ok(id) => answer(&api, Request::Activate(id)).await,
        Err(refusal) => *refusal,
    }
}

async fn prepare_removal(State(api): State<Api>, uri: Uri) -> HttpResponse {
    match parameter(&uri, "node") {
        Some(node) => answer(&api, Request::PrepareRemoval(node)).await,
        None => failed(ApiError::new(ErrorCode::Invalid, "say which node: ?node=NAME or ID")),
    }
}

async fn remove(
    State(api): State<Api>,
    request: Result<Json<RemovalRequest>, JsonRejection>,
) -> HttpResponse {
    match body(request) {
        Ok(RemovalRequest::Node(node)) => answer(&api, Request::Remove(node)).await,
        Ok(RemovalRequest::Signed { removal, policy }) => {
            let policies = policy.into_iter().collect();
            let delta = Delta { removals: vec![removal], policies, ..Delta::default() };
            answer(&api, Request::Declare(Box::new(delta))).await
        }
        Err(refusal) => *refusal,
    }
}

async fn leave(State(api): State<Api>) -> HttpResponse {
    answer(&api, Request::Leave(true)).await
}

async fn stay(State(api): State<Api>) -> HttpResponse {
    answer(&api, Request::Leave(false)).await
}

async fn join_window(State(api): State<Api>) -> HttpResponse {
    answer(&api, Request::JoinWindow).await
}

async fn set_join_window(
    State(api): State<Api>,
    request: Result<Json<JoinWindowRequest>, JsonRejection>,
) -> HttpResponse {
    match body(request) {
        Ok(JoinWindowRequest::Set(window)) => answer(&api, Request::SetJoinWindow(window)).await,
        Ok(JoinWindowRequest::Signed(policy)) => {
            let delta = Delta { policies: vec![policy], ..Delta::default() };
            answer(&api, Request::Declare(Box::new(delta))).await
        }
        Err(refusal) => *refusal,
    }
}

async fn tokens(State(api): State<Api>) -> HttpResponse {
    answer(&api, Request::Tokens).await
}

async fn create_token(
    State(api): State<Api>,
    request: Result<Json<TokenRequest>, JsonRejection>,
) -> HttpResponse {
    match body(request) {
        Ok(TokenRequest::New(token)) => answer(&api, Request::CreateToken(token)).await,
        Ok(TokenRequest::Signed(token)) => {
            let delta = Delta { tokens: vec![token], ..Delta::default() };
            answer(&api, Request::Declare(Box::new(delta))).await
        }
        Err(refusal) => *refusal,
    }
}

async fn revoke_token(
    State(api): State<Api>,
    request: Result<Json<RevocationRequest>, JsonRejection>,
) -> HttpResponse {
    match body(request) {
        Ok(RevocationRequest::Id(id)) => answer(&api, Request::RevokeToken(id)).await,
        Ok(RevocationRequest::Signed(revocation)) => {
            let delta = Delta { revocations: vec![revocation], ..Delta::default() };
            answer(&api, Request::Declare(Box::new(delta))).await
        }
        Err(refusal) => *refusal,
    }
}

/// The value of a parameter in the query of a request.
fn parameter(uri: &Uri, name: &str) -> Option<String> {
    let pairs = uri.query()?.split('&').filter_map(|pair| pair.split_once('='));
    let (_, value) = pairs.into_iter().find(|(key, _)| *key == name)?;
    Some(percent_encoding::percent_decode_str(value).decode_utf8_lossy().into_owned())
}

async fn unknown(uri: Uri) -> HttpResponse {
    failed(ApiError::new(
        ErrorCode::NotFound,
        format!("this daemon has no {}; is it older than the program that asks?", uri.path()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/meshd.sock");
        let living = bind(&path).unwrap();
        assert!(format!("{:#}", bind(&path).unwrap_err()).contains("another meshd answers"));
        drop(living);
        drop(bind(&path).unwrap());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);

        // A key file, say.
        let file = dir.path().join("run/key");
        std::fs::write(&file, "precious").unwrap();
        let link = dir.path().join("run/link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for path in [&file, &link, &dir.path().join("run")] {
            let error = format!("{:#}", bind(path).unwrap_err());
            assert!(error.contains("is no socket"), "{error}");
        }
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    }

    #[tokio::test]
    async fn a_directory_that_others_use_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("of-others"), "").unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o1777)).unwrap();
        let error = format!("{:#}", bind(&dir.path().join("meshd.sock")).unwrap_err());
        assert!(error.contains("open to others"), "{error}");
        assert_eq!(std::fs::metadata(dir.path()).unwrap().permissions().mode() & 0o7777, 0o1777);
    }
}
