//! The units for systemd: their texts. `.ci/units` has systemd verify and rate them.

use crate::harness::program;

/// Returns the text of a unit.
#[track_caller]
fn unit(name: &[&str]) -> String {
    let finished = program().arg("unit").args(name).run();
    assert_eq!((finished.code, &*finished.stderr), (0, ""), "{name:?}");
    finished.stdout
}

#[test]
fn the_template_is_the_service_with_files_of_its_instance() {
    let service = unit(&[]);
    assert_eq!(service, unit(&["service"]));
    // A stop whose grace period was over, by its exit code, is no failure of the unit.
    for line in [
        "\nType=notify\n",
        // The process that is to end says which one takes over; another one could not.
        "\nNotifyAccess=main\n",
        "\nExecReload=tcpause upgrade --config ",
        // It waits: systemd does not, at the end of a process that an upgrade has started.
        "\nExecStop=-sh -c 'kill $MAINPID && exec tail ",
        "\nWatchdogSec=",
        "\nSuccessExitStatus=3\n",
    ] {
        assert!(service.contains(line), "{service}");
    }
    let expected = service
        .replace("Description=tcpause,", "Description=tcpause for %i,")
        .replace("/etc/tcpause/tcpause.yml", "/etc/tcpause/%i.yml")
        .replace("Directory=tcpause\n", "Directory=tcpause-%i\n");
    assert_eq!(unit(&["template"]), expected);
}

#[test]
fn the_socket_has_the_name_and_the_address_of_the_proxy() {
    let socket = unit(&["socket"]);
    for line in ["FileDescriptorName=proxy", "ListenStream=127.0.0.1:3000"] {
        assert!(socket.lines().any(|it| it == line), "{socket}");
    }
    assert_eq!(
        tcpause::Config::default().get("proxy.addr").as_deref(),
        Some("tcp://localhost:3000")
    );
}

/// `bpf` is among the privileged calls that the service does without.
#[test]
fn the_rights_of_steering_add_to_those_of_the_service() {
    let rights = unit(&["steering"]);
    for line in [
        "\n[Service]\n",
        "\nAmbientCapabilities=CAP_BPF CAP_NET_ADMIN\n",
        "\nCapabilityBoundingSet=CAP_BPF CAP_NET_ADMIN\n",
        "\nSystemCallFilter=bpf\n",
        "\nRestrictAddressFamilies=AF_NETLINK\n",
    ] {
        assert!(rights.contains(line), "{rights}");
    }
    // An empty list would take away what the service has.
    assert!(!rights.lines().any(|line| line.ends_with('=')), "{rights}");
}

/// A unit with an option that does not exist would not start.
#[test]
fn the_service_calls_the_program_as_it_can_be_called() {
    let service = unit(&["service"]);
    let run = |key: &str, last| {
        let start = format!("{key}=tcpause ");
        let call = service.lines().find_map(|line| line.strip_prefix(&start)).unwrap();
        let call = call.replace("/etc/tcpause/tcpause.yml", "tcpause.yml");
        program().file("tcpause.yml", "{}").args(call.split(' ')).arg(last).run()
    };
    let finished = run("ExecStart", "--check-config");
    assert_eq!(finished.code, 0, "{finished:?}");
    // This is the last that it looks at before it asks.
    let finished = run("ExecReload", "--control-addr=localhost:0");
    assert!(finished.stderr.contains("has port 0"), "{finished:?}");
}

#[test]
fn a_unit_that_does_not_exist_is_an_error_with_the_names() {
    for (args, told) in [
        (
            &["timer"][..],
            "unit: unknown unit \"timer\"; there are service, socket, template, steering",
        ),
        (&["socket", "x"], "unexpected argument \"x\"; remove it"),
    ] {
        let finished = program().arg("unit").args(args).run();
        assert_eq!((finished.code, &*finished.stdout), (2, ""));
        assert!(finished.stderr.contains(told), "{finished:?}");
    }
}
