//! Whom the telemetry is about: the service, the container, the machine, the platform. Pure: variables and files are handed in.
//!
//! `OTEL_RESOURCE_ATTRIBUTES` wins over what was found, and `OTEL_SERVICE_NAME` over both. No request is made to any metadata
//! service: a start must not wait for one.

use std::collections::BTreeMap;

use agent_sidecar_core::telemetry::Value;

use super::environment::percent_decoded;

/// By name; names follow the semantic conventions.
pub(crate) type Resource = BTreeMap<String, String>;

/// What the surroundings are read from.
pub(crate) struct Surroundings<'a> {
    pub(crate) lookup: &'a dyn Fn(&str) -> Option<String>,
    /// The text of a small file below `/proc` or `/etc`.
    pub(crate) file: &'a dyn Fn(&str) -> Option<String>,
    pub(crate) pid: u32,
    /// Unique to this run.
    pub(crate) instance: &'a str,
}

/// Variables that say an attribute as it is. Where several say the same, the first that is set counts.
const NAMED: &[(&str, &[&str])] = &[
    // The downward API, under the names that charts and operators give it.
    ("k8s.pod.name", &["K8S_POD_NAME", "POD_NAME", "MY_POD_NAME"]),
    ("k8s.pod.uid", &["K8S_POD_UID", "POD_UID", "MY_POD_UID"]),
    ("k8s.namespace.name", &["K8S_NAMESPACE", "K8S_POD_NAMESPACE", "POD_NAMESPACE", "MY_POD_NAMESPACE"]),
    ("k8s.node.name", &["K8S_NODE_NAME", "NODE_NAME", "MY_NODE_NAME"]),
    ("k8s.container.name", &["K8S_CONTAINER_NAME", "CONTAINER_NAME"]),
    ("k8s.deployment.name", &["K8S_DEPLOYMENT_NAME"]),
    ("k8s.cluster.name", &["K8S_CLUSTER_NAME", "CLUSTER_NAME"]),
];

/// A platform: the variable that gives it away, what that means, and which variables say more.
struct Platform {
    sign: &'static str,
    fixed: &'static [(&'static str, &'static str)],
    named: &'static [(&'static str, &'static str)],
}

/// What has no name in the conventions is under the platform's own.
const PLATFORMS: &[Platform] = &[
    Platform {
        sign: "FLY_APP_NAME",
        fixed: &[("cloud.provider", "fly_io"), ("cloud.platform", "fly_io_machines")],
        named: &[
            ("cloud.region", "FLY_REGION"),
            ("fly.app.name", "FLY_APP_NAME"),
            ("fly.machine.id", "FLY_MACHINE_ID"),
            ("fly.process_group", "FLY_PROCESS_GROUP"),
            ("container.image.name", "FLY_IMAGE_REF"),
        ],
    },
    Platform {
        sign: "K_SERVICE",
        fixed: &[("cloud.provider", "gcp"), ("cloud.platform", "gcp_cloud_run")],
        named: &[("faas.name", "K_SERVICE"), ("faas.version", "K_REVISION")],
    },
    Platform {
        sign: "CLOUD_RUN_JOB",
        fixed: &[("cloud.provider", "gcp"), ("cloud.platform", "gcp_cloud_run")],
        named: &[
            ("faas.name", "CLOUD_RUN_JOB"),
            ("gcp.cloud_run.job.execution", "CLOUD_RUN_EXECUTION"),
            ("gcp.cloud_run.job.task_index", "CLOUD_RUN_TASK_INDEX"),
        ],
    },
    Platform {
        sign: "MODAL_TASK_ID",
        fixed: &[("cloud.platform", "modal")],
        named: &[
            ("cloud.region", "MODAL_REGION"),
            ("modal.task.id", "MODAL_TASK_ID"),
            ("modal.sandbox.id", "MODAL_SANDBOX_ID"),
            ("modal.image.id", "MODAL_IMAGE_ID"),
            ("modal.environment", "MODAL_ENVIRONMENT"),
        ],
    },
    Platform {
        sign: "DAYTONA_SANDBOX_ID",
        fixed: &[("cloud.platform", "daytona")],
        named: &[
            ("cloud.region", "DAYTONA_REGION_ID"),
            ("daytona.sandbox.id", "DAYTONA_SANDBOX_ID"),
            ("daytona.sandbox.snapshot", "DAYTONA_SANDBOX_SNAPSHOT"),
        ],
    },
    Platform {
        sign: "E2B_SANDBOX_ID",
        fixed: &[("cloud.platform", "e2b")],
        named: &[("e2b.sandbox.id", "E2B_SANDBOX_ID"), ("e2b.template.id", "E2B_TEMPLATE_ID")],
    },
    Platform {
        sign: "VERCEL",
        fixed: &[("cloud.provider", "vercel"), ("cloud.platform", "vercel")],
        named: &[
            ("cloud.region", "VERCEL_REGION"),
            ("deployment.environment.name", "VERCEL_ENV"),
            ("vercel.deployment.id", "VERCEL_DEPLOYMENT_ID"),
        ],
    },
    Platform {
        sign: "CLOUDFLARE_APPLICATION_ID",
        fixed: &[("cloud.provider", "cloudflare"), ("cloud.platform", "cloudflare_containers")],
        named: &[
            ("cloud.region", "CLOUDFLARE_REGION"),
            ("cloudflare.application.id", "CLOUDFLARE_APPLICATION_ID"),
            ("cloudflare.location", "CLOUDFLARE_LOCATION"),
        ],
    },
    Platform {
        sign: "ECS_CONTAINER_METADATA_URI_V4",
        fixed: &[("cloud.provider", "aws"), ("cloud.platform", "aws_ecs")],
        named: &[("cloud.region", "AWS_REGION")],
    },
];

/// All that is known.
pub(crate) fn detect(of: &Surroundings<'_>) -> Resource {
    let get = |name: &str| (of.lookup)(name).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
    let mut resource = Resource::new();
    let mut say = |name: &str, value: String| drop(resource.insert(name.to_owned(), value));

    say("service.name", String::from("agent-sidecar"));
    say("service.version", String::from(env!("CARGO_PKG_VERSION")));
    say("service.instance.id", of.instance.to_owned());
    say("os.type", String::from("linux"));
    say("host.arch", String::from(architecture(std::env::consts::ARCH)));
    say("process.pid", of.pid.to_string());
    if let Some(name) = (of.file)("/proc/sys/kernel/hostname").map(|text| text.trim().to_owned()).filter(|name| !name.is_empty())
    {
        say("host.name", name);
    }
    if let Some(id) = container_id(of.file).or_else(|| get("ECS_CONTAINER_METADATA_URI_V4").and_then(|uri| ecs_id(&uri))) {
        say("container.id", id);
    }
    for (name, variables) in NAMED {
        if let Some(value) = variables.iter().find_map(|variable| get(variable)) {
            // Anybody may call a variable NODE_NAME: it means that only where there is a cluster.
            if variables.iter().any(|variable| variable.starts_with("K8S_") && get(variable).is_some())
                || get("KUBERNETES_SERVICE_HOST").is_some()
            {
                say(name, value);
            }
        }
    }
    if let Some(platform) = PLATFORMS.iter().find(|platform| get(platform.sign).is_some()) {
        for (name, value) in platform.fixed {
            say(name, (*value).to_owned());
        }
        for (name, variable) in platform.named {
            if let Some(value) = get(variable) {
                say(name, value);
            }
        }
    }
    // `CLOUD_PROVIDER_AWS` and the like.
    if let Some(cloud) = get("MODAL_CLOUD_PROVIDER") {
        say("cloud.provider", cloud.trim_start_matches("CLOUD_PROVIDER_").to_lowercase());
    }
    for (name, value) in attributes(&get("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default()) {
        say(&name, value);
    }
    if let Some(name) = get("OTEL_SERVICE_NAME") {
        say("service.name", name);
    }
    resource
}

/// As the conventions have it: these are numbers.
pub(crate) fn value(name: &str, text: String) -> Value {
    match text.parse::<i64>() {
        Ok(number) if matches!(name, "process.pid" | "process.parent_pid" | "gcp.cloud_run.job.task_index") => Value::Int(number),
        _ => Value::Str(text),
    }
}

/// One of the attributes that `OTEL_RESOURCE_ATTRIBUTES` declares.
pub(crate) fn declared(name: &str, text: &str) -> Option<String> {
    attributes(text).into_iter().find(|(known, _)| known == name).map(|(_, value)| value)
}

/// `name=value,name=value`, both percent-encoded. By the specification one that is wrong spoils all.
fn attributes(text: &str) -> Vec<(String, String)> {
    let pairs = text.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    let read = pairs.map(|pair| {
        let (name, value) = pair.split_once('=')?;
        let (name, value) = (percent_decoded(name.trim()), percent_decoded(value.trim()));
        (!name.is_empty()).then_some((name, value))
    });
    let read: Option<Vec<_>> = read.collect();
    if read.is_none() {
        tracing::warn!("OTEL_RESOURCE_ATTRIBUTES is not understood and left out; write name=value,name=value");
    }
    read.unwrap_or_default()
}

fn architecture(rust: &str) -> &str {
    match rust {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "x86",
        "arm" => "arm32",
        "powerpc64" => "ppc64",
        other => other,
    }
}

/// From the cgroup's path (version 1, or version 2 outside of a namespace), else from what the runtime mounts into the container.
fn container_id(file: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    let cgroup = file("/proc/self/cgroup").unwrap_or_default();
    let in_path = cgroup.lines().filter_map(|line| line.splitn(3, ':').nth(2)).find_map(|path| {
        // docker-<id>.scope, cri-containerd-<id>.scope, kubepods/…/<id>, libpod-<id>
        let last = path.rsplit('/').next()?.trim_end_matches(".scope");
        id(last.rsplit(['-', ':']).next()?)
    });
    in_path.or_else(|| {
        let mounts = file("/proc/self/mountinfo").unwrap_or_default();
        mounts.lines().find_map(|line| {
            // Not the layers of the root: those have ids of their own.
            let root = line.split(' ').nth(3)?;
            let at = line.split(' ').nth(4)?;
            let files = ["/etc/hostname", "/etc/resolv.conf", "/etc/hosts"];
            files.contains(&at).then(|| root.split('/').find_map(id)).flatten()
        })
    })
}

/// 64 hexadecimal digits.
fn id(text: &str) -> Option<String> {
    (text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| text.to_owned())
}

/// `http://169.254.170.2/v4/<container>`: on Fargate that is the task's id and a number.
fn ecs_id(uri: &str) -> Option<String> {
    let last = uri.rsplit('/').next()?;
    (last.len() >= 32 && last.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')).then(|| last.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn detect(variables: &[(&str, &str)], files: &[(&str, &str)]) -> Resource {
        let find = |pairs: &[(&str, &str)], name: &str| {
            pairs.iter().find(|(known, _)| *known == name).map(|(_, text)| (*text).replace("<id>", ID))
        };
        let (lookup, file) = (|name: &str| find(variables, name), |path: &str| find(files, path));
        super::detect(&Surroundings { lookup: &lookup, file: &file, pid: 7, instance: "run-1" })
    }

    fn said(resource: &Resource, prefix: &str) -> String {
        let some = resource.iter().filter(|(name, _)| name.starts_with(prefix));
        some.map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_bare_machine_has_a_service_a_host_and_a_process() {
        let resource = detect(&[], &[("/proc/sys/kernel/hostname", "box\n"), ("/proc/self/cgroup", "0::/init.scope\n")]);
        let names: Vec<&str> = resource.keys().map(String::as_str).collect();
        let expected =
            ["host.arch", "host.name", "os.type", "process.pid", "service.instance.id", "service.name", "service.version"];
        assert_eq!(names, expected);
        assert_eq!((resource["host.name"].as_str(), resource["service.name"].as_str()), ("box", "agent-sidecar"));
    }

    #[test]
    fn numbers_are_numbers_where_the_conventions_have_them() {
        assert_eq!(value("process.pid", String::from("7")), Value::Int(7));
        assert_eq!(value("process.pid", String::from("x")), Value::Str(String::from("x")));
        assert_eq!(value("k8s.pod.name", String::from("7")), Value::Str(String::from("7")));
    }

    #[test]
    fn a_container_is_known_by_its_cgroup_or_its_mounts() {
        for cgroup in [
            "12:memory:/docker/<id>\n11:cpu:/docker/<id>\n",
            "0::/system.slice/docker-<id>.scope\n",
            "0::/kubepods.slice/kubepods-burstable.slice/kubepods-pod1.slice/cri-containerd-<id>.scope\n",
            "5:devices:/kubepods/besteffort/pod31dd274d/<id>\n",
            "0::/user.slice/libpod-<id>.scope\n",
        ] {
            assert_eq!(
                said(&detect(&[], &[("/proc/self/cgroup", cgroup)]), "container"),
                format!("container.id={ID}"),
                "{cgroup}"
            );
        }
        let mounts = "1 0 0:45 / / rw - overlay overlay rw,lowerdir=/x/aaaa\n\
                      2 1 8:1 /var/lib/docker/containers/<id>/hostname /etc/hostname rw - ext4 /dev/sda1 rw\n";
        let inside = detect(&[], &[("/proc/self/cgroup", "0::/\n"), ("/proc/self/mountinfo", mounts)]);
        assert_eq!(said(&inside, "container"), format!("container.id={ID}"));
        assert_eq!(said(&detect(&[], &[("/proc/self/cgroup", "0::/\n")]), "container"), "");
    }

    #[test]
    fn each_platform_gives_itself_away() {
        for (variables, expected) in [
            (
                &[("FLY_APP_NAME", "app"), ("FLY_MACHINE_ID", "m1"), ("FLY_REGION", "ams")][..],
                "cloud.platform=fly_io_machines cloud.provider=fly_io cloud.region=ams",
            ),
            (&[("K_SERVICE", "s"), ("K_REVISION", "s-1")], "cloud.platform=gcp_cloud_run cloud.provider=gcp"),
            (&[("CLOUD_RUN_JOB", "j")], "cloud.platform=gcp_cloud_run cloud.provider=gcp"),
            (
                &[("MODAL_TASK_ID", "ta-1"), ("MODAL_REGION", "us-east-1"), ("MODAL_CLOUD_PROVIDER", "CLOUD_PROVIDER_AWS")],
                "cloud.platform=modal cloud.provider=aws cloud.region=us-east-1",
            ),
            (&[("DAYTONA_SANDBOX_ID", "d")], "cloud.platform=daytona"),
            (&[("E2B_SANDBOX_ID", "e")], "cloud.platform=e2b"),
            (&[("VERCEL", "1"), ("VERCEL_REGION", "iad1")], "cloud.platform=vercel cloud.provider=vercel cloud.region=iad1"),
            (
                &[("ECS_CONTAINER_METADATA_URI_V4", "http://169.254.170.2/v4/<id>"), ("AWS_REGION", "eu-west-1")],
                "cloud.platform=aws_ecs cloud.provider=aws cloud.region=eu-west-1",
            ),
            (
                &[("CLOUDFLARE_APPLICATION_ID", "a"), ("CLOUDFLARE_REGION", "WEUR")],
                "cloud.platform=cloudflare_containers cloud.provider=cloudflare cloud.region=WEUR",
            ),
        ] {
            assert_eq!(said(&detect(variables, &[]), "cloud."), expected, "{variables:?}");
        }
        let ecs = detect(&[("ECS_CONTAINER_METADATA_URI_V4", "http://169.254.170.2/v4/<id>")], &[]);
        assert_eq!(ecs["container.id"], ID);
    }

    #[test]
    fn a_pod_is_known_where_there_is_a_cluster() {
        let variables = [("POD_NAME", "p-1"), ("POD_NAMESPACE", "ns"), ("NODE_NAME", "n1"), ("POD_UID", "u")];
        assert_eq!(said(&detect(&variables, &[]), "k8s"), "");
        let in_a_cluster = [&variables[..], &[("KUBERNETES_SERVICE_HOST", "10.0.0.1")]].concat();
        let expected = "k8s.namespace.name=ns k8s.node.name=n1 k8s.pod.name=p-1 k8s.pod.uid=u";
        assert_eq!(said(&detect(&in_a_cluster, &[]), "k8s"), expected);
        assert_eq!(said(&detect(&[("K8S_POD_NAME", "p-2")], &[]), "k8s"), "k8s.pod.name=p-2");
    }

    #[test]
    fn what_the_operator_says_wins() {
        let said = |variables: &[(&str, &str)]| {
            let resource = detect(variables, &[("/proc/sys/kernel/hostname", "box")]);
            ["service.name", "host.name", "team"].map(|name| resource.get(name).cloned().unwrap_or_default()).join(" ")
        };
        assert_eq!(said(&[("OTEL_RESOURCE_ATTRIBUTES", "team=a%2Cb, host.name = other ,service.name=x")]), "x other a,b");
        assert_eq!(said(&[("OTEL_RESOURCE_ATTRIBUTES", "service.name=x"), ("OTEL_SERVICE_NAME", "y")]), "y box ");
        assert_eq!(said(&[("OTEL_RESOURCE_ATTRIBUTES", "team=a,nonsense")]), "agent-sidecar box ");
        assert_eq!(said(&[("OTEL_SERVICE_NAME", "")]), "agent-sidecar box ");
    }
}
