use super::*;

fn settings(more: &str) -> std::result::Result<Settings, String> {
    let text = format!(
        "kernel = \"/k/vmlinux\"\ndirectory = \"/var/lib/m\"\n{more}\n[network]\ntap_prefix = \"fc\"\ntaps = 8\nfirst = \"172.30.0.0\"\n"
    );
    toml::from_str(&text).map_err(|error| error.to_string())
}

fn spec() -> Spec {
    let spec = json!({ "key": "agent-1", "image": "/i/agent.ext4", "command": ["agent-sidecar", "run"], "ttl": { "secs": 60, "nanos": 0 } });
    serde_json::from_value(spec).unwrap()
}

fn record() -> Record {
    let size = Size { cpu_milli: 2000, memory_mib: 512, disk_mib: 1024 };
    let (labels, created) = (BTreeMap::new(), Timestamp::UNIX_EPOCH);
    Record { key: String::from("agent-1"), image: String::from("/i/agent.ext4"), size, labels, created, tap: 5 }
}

#[test]
fn it_is_told_everything_in_an_order_that_firecracker_takes() {
    let provider = Firecracker::new(settings("reach = \"vsock\"").unwrap()).unwrap();
    let told = provider.configuration(&record(), &provider.place("agent-1"), "set -- 'x'\n", &[9477, 8080]);
    let expected = r#"/logger {"level":"Warning","log_path":"/var/lib/m/agent-1/files/log","show_level":true}
/machine-config {"mem_size_mib":512,"vcpu_count":2}
/boot-source {"boot_args":"console=ttyS0 reboot=k panic=1 quiet loglevel=3 i8042.noaux i8042.nomux i8042.dumbkbd init=/sbin/agent-init ip=172.30.0.22::172.30.0.21:255.255.255.252:agent-1:eth0:off","kernel_image_path":"/k/vmlinux"}
/drives/rootfs {"drive_id":"rootfs","is_read_only":true,"is_root_device":true,"path_on_host":"/i/agent.ext4"}
/drives/disk {"drive_id":"disk","is_read_only":false,"is_root_device":false,"path_on_host":"/var/lib/m/agent-1/files/disk"}
/network-interfaces/eth0 {"guest_mac":"06:00:ac:1e:00:16","host_dev_name":"fc5","iface_id":"eth0"}
/entropy {}
/vsock {"guest_cid":3,"uds_path":"/var/lib/m/agent-1/files/vsock.sock"}
/mmds/config {"network_interfaces":["eth0"],"version":"V2"}
/mmds {"agent-fleet":{"id":"agent-1","start":"set -- 'x'\n","vsock":"9477 8080"}}
"#;
    let said: String = told.iter().map(|(path, body)| format!("{path} {body}\n")).collect();
    assert_eq!(said, expected);
}

#[test]
fn in_a_jail_it_sees_its_own_files() {
    let jailer = "jailer = { program = \"/j\", uid = 1, gid = 2, chroot_base = \"/srv/jails\" }";
    let provider = Firecracker::new(settings(jailer).unwrap()).unwrap();
    let place = provider.place("agent-1");
    assert_eq!(place.socket(), Path::new("/srv/jails/firecracker/agent-1/root/api.sock"));
    let told = provider.configuration(&record(), &place, "", &[]);
    let of = |path: &str, name: &str| told.iter().find(|(told, _)| *told == path).map(|(_, body)| body[name].clone()).unwrap();
    assert_eq!(of("/boot-source", "kernel_image_path"), "/kernel");
    assert_eq!(of("/drives/rootfs", "path_on_host"), "/rootfs");
    assert_eq!(of("/drives/disk", "path_on_host"), "/disk");
}

#[test]
fn settings_are_read_and_a_slip_in_them_is_said() {
    let plain = settings("").unwrap();
    assert_eq!((plain.jailer, plain.reach, plain.clock_realtime), (None, Reach::Network, false));
    assert!(settings("kernle = 1").unwrap_err().contains("kernle"));
    let mut wrong = settings("").unwrap();
    wrong.network.first = Ipv4Addr::new(172, 30, 0, 1);
    assert!(Firecracker::new(wrong.clone()).is_err());
    wrong.network = Network { taps: u32::MAX, first: Ipv4Addr::new(172, 30, 0, 0), ..wrong.network };
    assert!(Firecracker::new(wrong.clone()).is_err());
    wrong.network = Network { taps: 8, tap_prefix: String::from("a-long-device-na"), ..wrong.network };
    assert!(Firecracker::new(wrong.clone()).is_err());
    wrong = Settings { directory: PathBuf::from("m"), ..settings("").unwrap() };
    assert!(Firecracker::new(wrong).is_err());
}

#[test]
fn a_word_is_one_word_to_a_shell() {
    assert_eq!(quoted("it's"), r"'it'\''s'");
    let mut spec = spec();
    spec.env.insert(String::from("A"), String::from("$(rm x)"));
    assert_eq!(start(&spec, &BTreeMap::new()).unwrap(), "export A='$(rm x)'\nset -- 'agent-sidecar' 'run'\n");
    for (name, value) in [("A=B", ""), ("1A", ""), ("", ""), ("A;rm", ""), ("A", "\0")] {
        let env = BTreeMap::from([(name.to_owned(), value.to_owned())]);
        assert!(start(&Spec { env, ..spec.clone() }, &BTreeMap::new()).is_err(), "{name}");
    }
    assert!(start(&Spec { command: Vec::new(), ..spec.clone() }, &BTreeMap::new()).is_err());
    let env = BTreeMap::from([(String::from("A"), "\u{1}".repeat(200_000))]);
    assert!(start(&Spec { env, ..spec }, &BTreeMap::new()).is_err(), "as JSON it is a megabyte");
}

#[test]
fn the_last_word_of_the_init_is_how_it_ended() {
    let said = |text: &str| ended(text.as_bytes());
    assert_eq!(said("agent-init: the command has ended with 3\r\n[    1.2] reboot: Restarting system\r\n"), Some(3));
    assert_eq!(said("agent-init: the command has ended with 3\nagent-init: the command has ended with 143\n"), Some(143));
    assert_eq!(said("Kernel panic - not syncing"), None);
    assert_eq!(said("agent-init: the command has ended with 1"), None, "the rest of the number is not there yet");
}

#[test]
fn what_firecracker_says_is_told_by_what_can_be_done() {
    let passes = |fault| wrong(fault).is_passing();
    assert!(!passes(Fault::Said(400, String::from("Invalid kernel command line"))));
    assert!(passes(Fault::Said(400, String::from("Open tap device failed: Resource busy (os error 16)"))));
    assert!(passes(Fault::Said(500, String::from("x"))) && passes(Fault::Unreached(String::from("x"))));
    assert!(matches!(wrong(Fault::Lost(String::from("x"))), Error::Unsure { .. }));
    let provider = Firecracker::new(settings("").unwrap()).unwrap();
    let full = provider.broken(&io::ErrorKind::StorageFull.into());
    assert!(full.is_passing() && full.to_string().contains("/var/lib/m is full"), "{full}");
    let denied = provider.broken(&io::ErrorKind::PermissionDenied.into());
    assert!(!denied.is_passing() && denied.to_string().contains("/var/lib/m cannot be used"), "{denied}");
}

#[test]
fn a_cpu_is_whole_and_is_paid_for_whole() {
    let size = |cpu_milli| Size { cpu_milli, memory_mib: 1024, disk_mib: 0 };
    assert_eq!([1, 1000, 1001, 64_000].map(|milli| cpus(size(milli))), [1, 1, 2, 32]);
    let provider = Firecracker::new(settings("cpu_usd_per_hour = 1.0\ngib_usd_per_hour = 0.5").unwrap()).unwrap();
    let price = provider.price(size(1500));
    assert_eq!((price.running, price.paused, price.stopped, price.source.as_str()), (2.5, 0.0, 0.0, "the configuration"));
}
