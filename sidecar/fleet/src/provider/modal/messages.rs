//! What of Modal's messages is sent and read: `modal_proto/api.proto` and `task_command_router.proto`, by hand, so that nothing has to be compiled that
//! is not used. Names, numbers and types are theirs; a test holds each line against what they publish. Fields that are not here are not read.

use std::collections::HashMap;

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct AppGetOrCreateRequest {
    #[prost(string, tag = "1")]
    pub(super) app_name: String,
    #[prost(string, tag = "2")]
    pub(super) environment_name: String,
    #[prost(int32, tag = "3")]
    pub(super) object_creation_type: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct AppGetOrCreateResponse {
    #[prost(string, tag = "1")]
    pub(super) app_id: String,
}

/// Make it if it is not there.
pub(super) const CREATE_IF_MISSING: i32 = 1;
/// Make one without a name, which goes when the app goes.
pub(super) const ANONYMOUS_OWNED_BY_APP: i32 = 4;

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SecretGetOrCreateRequest {
    #[prost(string, tag = "1")]
    pub(super) deployment_name: String,
    #[prost(string, tag = "3")]
    pub(super) environment_name: String,
    #[prost(int32, tag = "4")]
    pub(super) object_creation_type: i32,
    #[prost(map = "string, string", tag = "5")]
    pub(super) env_dict: HashMap<String, String>,
    #[prost(string, tag = "6")]
    pub(super) app_id: String,
    #[prost(string, repeated, tag = "7")]
    pub(super) required_keys: Vec<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SecretGetOrCreateResponse {
    #[prost(string, tag = "1")]
    pub(super) secret_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ImageGetOrCreateRequest {
    #[prost(message, optional, tag = "2")]
    pub(super) image: Option<Image>,
    #[prost(string, tag = "4")]
    pub(super) app_id: String,
    #[prost(string, tag = "9")]
    pub(super) builder_version: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Image {
    #[prost(string, repeated, tag = "6")]
    pub(super) dockerfile_commands: Vec<String>,
    #[prost(message, optional, tag = "17")]
    pub(super) image_registry_config: Option<ImageRegistryConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ImageRegistryConfig {
    #[prost(int32, tag = "1")]
    pub(super) registry_auth_type: i32,
    #[prost(string, tag = "2")]
    pub(super) secret_id: String,
}

/// A user's name and a password.
pub(super) const STATIC_CREDS: i32 = 4;

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ImageGetOrCreateResponse {
    #[prost(string, tag = "1")]
    pub(super) image_id: String,
    #[prost(message, optional, tag = "2")]
    pub(super) result: Option<GenericResult>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ImageJoinStreamingRequest {
    #[prost(string, tag = "1")]
    pub(super) image_id: String,
    #[prost(float, tag = "2")]
    pub(super) timeout: f32,
    #[prost(string, tag = "3")]
    pub(super) last_entry_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ImageJoinStreamingResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) result: Option<GenericResult>,
    #[prost(string, tag = "3")]
    pub(super) entry_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct GenericResult {
    #[prost(int32, tag = "1")]
    pub(super) status: i32,
    #[prost(string, tag = "2")]
    pub(super) exception: String,
    #[prost(int32, tag = "3")]
    pub(super) exitcode: i32,
}

/// What [`GenericResult::status`] says. Nothing is said while it goes on.
pub(super) mod status {
    pub(crate) const SUCCESS: i32 = 1;
    pub(crate) const FAILURE: i32 = 2;
    pub(crate) const TERMINATED: i32 = 3;
    pub(crate) const TIMEOUT: i32 = 4;
    pub(crate) const INIT_FAILURE: i32 = 5;
    pub(crate) const INTERNAL_FAILURE: i32 = 6;
    pub(crate) const IDLE_TIMEOUT: i32 = 7;
    pub(crate) const MEMORY_MANAGER_EVICTION: i32 = 8;
    pub(crate) const MEMORY_THRASHING_EVICTION: i32 = 9;
    pub(crate) const KERNEL_OOM_KILL: i32 = 10;
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SandboxCreateRequest {
    #[prost(string, tag = "1")]
    pub(super) app_id: String,
    #[prost(message, optional, tag = "2")]
    pub(super) definition: Option<Sandbox>,
    #[prost(message, repeated, tag = "4")]
    pub(super) tags: Vec<SandboxTag>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SandboxCreateResponse {
    #[prost(string, tag = "1")]
    pub(super) sandbox_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Sandbox {
    #[prost(string, repeated, tag = "1")]
    pub(super) entrypoint_args: Vec<String>,
    #[prost(string, tag = "3")]
    pub(super) image_id: String,
    #[prost(string, repeated, tag = "4")]
    pub(super) secret_ids: Vec<String>,
    #[prost(message, optional, tag = "5")]
    pub(super) resources: Option<Resources>,
    #[prost(uint32, tag = "7")]
    pub(super) timeout_secs: u32,
    #[prost(message, optional, tag = "17")]
    pub(super) scheduler_placement: Option<SchedulerPlacement>,
    #[prost(message, optional, tag = "20")]
    pub(super) open_ports: Option<PortSpecs>,
    #[prost(message, optional, tag = "22")]
    pub(super) network_access: Option<NetworkAccess>,
    #[prost(string, optional, tag = "30")]
    pub(super) name: Option<String>,
    #[prost(uint32, optional, tag = "33")]
    pub(super) idle_timeout_secs: Option<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Resources {
    #[prost(uint32, tag = "2")]
    pub(super) memory_mb: u32,
    #[prost(uint32, tag = "3")]
    pub(super) milli_cpu: u32,
    #[prost(uint32, tag = "5")]
    pub(super) memory_mb_max: u32,
    #[prost(uint32, tag = "7")]
    pub(super) milli_cpu_max: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SchedulerPlacement {
    #[prost(string, repeated, tag = "4")]
    pub(super) regions: Vec<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct PortSpecs {
    #[prost(message, repeated, tag = "1")]
    pub(super) ports: Vec<PortSpec>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct PortSpec {
    #[prost(uint32, tag = "1")]
    pub(super) port: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct NetworkAccess {
    #[prost(int32, tag = "1")]
    pub(super) network_access_type: i32,
}

pub(super) const OPEN: i32 = 1;

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SandboxTag {
    #[prost(string, tag = "1")]
    pub(super) tag_name: String,
    #[prost(string, tag = "2")]
    pub(super) tag_value: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SandboxTagsGetRequest {
    #[prost(string, tag = "1")]
    pub(super) sandbox_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SandboxTagsGetResponse {
    #[prost(message, repeated, tag = "1")]
    pub(super) tags: Vec<SandboxTag>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SandboxGetFromNameRequest {
    #[prost(string, tag = "1")]
    pub(super) sandbox_name: String,
    #[prost(string, tag = "2")]
    pub(super) environment_name: String,
    #[prost(string, tag = "3")]
    pub(super) app_name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SandboxGetFromNameResponse {
    #[prost(string, tag = "1")]
    pub(super) sandbox_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SandboxListRequest {
    #[prost(string, tag = "1")]
    pub(super) app_id: String,
    #[prost(double, tag = "2")]
    pub(super) before_timestamp: f64,
    #[prost(string, tag = "3")]
    pub(super) environment_name: String,
    #[prost(bool, tag = "4")]
    pub(super) include_finished: bool,
    #[prost(message, repeated, tag = "5")]
    pub(super) tags: Vec<SandboxTag>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SandboxListResponse {
    /// Each a [`SandboxInfo`], read by itself: one that cannot be read hides no other.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub(super) sandboxes: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SandboxInfo {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(double, tag = "3")]
    pub(super) created_at: f64,
    #[prost(message, optional, tag = "4")]
    pub(super) task_info: Option<TaskInfo>,
    #[prost(message, repeated, tag = "6")]
    pub(super) tags: Vec<SandboxTag>,
    #[prost(uint32, tag = "11")]
    pub(super) timeout_secs: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TaskInfo {
    #[prost(double, tag = "2")]
    pub(super) started_at: f64,
    #[prost(message, optional, tag = "4")]
    pub(super) result: Option<GenericResult>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SandboxWaitRequest {
    #[prost(string, tag = "1")]
    pub(super) sandbox_id: String,
    #[prost(float, tag = "2")]
    pub(super) timeout: f32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SandboxWaitResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) result: Option<GenericResult>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SandboxTerminateRequest {
    #[prost(string, tag = "1")]
    pub(super) sandbox_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SandboxTerminateResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) existing_result: Option<GenericResult>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SandboxGetTaskIdRequest {
    #[prost(string, tag = "1")]
    pub(super) sandbox_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SandboxGetTaskIdResponse {
    #[prost(string, optional, tag = "1")]
    pub(super) task_id: Option<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SandboxGetLogsRequest {
    #[prost(string, tag = "1")]
    pub(super) sandbox_id: String,
    #[prost(int32, tag = "2")]
    pub(super) file_descriptor: i32,
    #[prost(float, tag = "3")]
    pub(super) timeout: f32,
    #[prost(string, tag = "4")]
    pub(super) last_entry_id: String,
}

pub(super) const STDOUT: i32 = 1;
pub(super) const STDERR: i32 = 2;

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TaskLogsBatch {
    #[prost(message, repeated, tag = "2")]
    pub(super) items: Vec<TaskLogs>,
    #[prost(bool, tag = "14")]
    pub(super) eof: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TaskLogs {
    #[prost(string, tag = "1")]
    pub(super) data: String,
    #[prost(double, tag = "7")]
    pub(super) timestamp: f64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SandboxGetTunnelsRequest {
    #[prost(string, tag = "1")]
    pub(super) sandbox_id: String,
    #[prost(float, tag = "2")]
    pub(super) timeout: f32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SandboxGetTunnelsResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) result: Option<GenericResult>,
    #[prost(message, repeated, tag = "2")]
    pub(super) tunnels: Vec<TunnelData>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TunnelData {
    #[prost(string, tag = "1")]
    pub(super) host: String,
    #[prost(uint32, tag = "2")]
    pub(super) port: u32,
    #[prost(uint32, tag = "5")]
    pub(super) container_port: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TaskGetCommandRouterAccessRequest {
    #[prost(string, tag = "1")]
    pub(super) task_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TaskGetCommandRouterAccessResponse {
    #[prost(string, tag = "1")]
    pub(super) jwt: String,
    #[prost(string, tag = "2")]
    pub(super) url: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TaskExecStartRequest {
    #[prost(string, tag = "1")]
    pub(super) task_id: String,
    #[prost(string, tag = "2")]
    pub(super) exec_id: String,
    #[prost(string, repeated, tag = "3")]
    pub(super) command_args: Vec<String>,
    #[prost(int32, tag = "4")]
    pub(super) stdout_config: i32,
    #[prost(int32, tag = "5")]
    pub(super) stderr_config: i32,
    #[prost(uint32, optional, tag = "6")]
    pub(super) timeout_secs: Option<u32>,
    #[prost(map = "string, string", tag = "12")]
    pub(super) env: HashMap<String, String>,
}

/// The output is kept until it is asked for; 0: it is thrown away.
pub(super) const PIPE: i32 = 1;

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TaskExecStartResponse {}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TaskExecStdinWriteRequest {
    #[prost(string, tag = "1")]
    pub(super) task_id: String,
    #[prost(string, tag = "2")]
    pub(super) exec_id: String,
    #[prost(uint64, tag = "3")]
    pub(super) offset: u64,
    #[prost(bytes = "vec", tag = "4")]
    pub(super) data: Vec<u8>,
    #[prost(bool, tag = "5")]
    pub(super) eof: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TaskExecStdinWriteResponse {}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TaskExecStdioReadRequest {
    #[prost(string, tag = "1")]
    pub(super) task_id: String,
    #[prost(string, tag = "2")]
    pub(super) exec_id: String,
    #[prost(uint64, tag = "3")]
    pub(super) offset: u64,
    #[prost(int32, tag = "4")]
    pub(super) file_descriptor: i32,
}

pub(super) const EXEC_STDOUT: i32 = 0;
pub(super) const EXEC_STDERR: i32 = 1;

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TaskExecStdioReadResponse {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) data: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TaskExecWaitRequest {
    #[prost(string, tag = "1")]
    pub(super) task_id: String,
    #[prost(string, tag = "2")]
    pub(super) exec_id: String,
}

/// Of `code` and `signal` one is there.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TaskExecWaitResponse {
    #[prost(int32, optional, tag = "1")]
    pub(super) code: Option<i32>,
    #[prost(int32, optional, tag = "2")]
    pub(super) signal: Option<i32>,
}

/// What comes with a no.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct RPCStatus {
    #[prost(message, repeated, tag = "3")]
    pub(super) details: Vec<Any>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Any {
    #[prost(string, tag = "1")]
    pub(super) type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) value: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct RPCRetryPolicy {
    #[prost(float, tag = "1")]
    pub(super) retry_after_secs: f32,
}
