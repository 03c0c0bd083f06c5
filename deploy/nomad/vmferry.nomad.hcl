# The agent on each client that has virtual machines (docs/orchestrators.md). The client's own configuration needs
#   client { max_kill_timeout = "120s"  meta { hypervisor = "true" } }
#   plugin "docker" { config { volumes { enabled = true } } }
job "vmferry" {
  type     = "system"
  priority = 80

  constraint {
    attribute = "${meta.hypervisor}"
    value     = "true"
  }

  group "agent" {
    network {
      mode = "host"
    }

    # It comes back for as long as it takes: migrations in flight wait for it.
    restart {
      mode     = "delay"
      attempts = 10
      interval = "1m"
      delay    = "2s"
    }

    task "agent" {
      driver = "docker"
      user   = "9907:9907"

      # Stopped, it rolls back what is before its hand-over and finishes what is behind it.
      kill_signal  = "SIGTERM"
      kill_timeout = "120s"

      config {
        image           = "registry.invalid/vmferry:0.1.0"
        args            = ["agent", "--config", "/etc/vmferry/vmferry.toml"]
        network_mode    = "host"
        pid_mode        = "host"
        privileged      = false
        readonly_rootfs = true
        cap_drop        = ["all"]
        group_add       = ["9908"]
        security_opt    = ["no-new-privileges"]

        mount {
          type     = "bind"
          source   = "/etc/vmferry"
          target   = "/etc/vmferry"
          readonly = true
        }

        mount {
          type   = "bind"
          source = "/var/lib/vmferry"
          target = "/var/lib/vmferry"
        }

        mount {
          type   = "bind"
          source = "/run/vmferry"
          target = "/run/vmferry"
        }

        mount {
          type   = "bind"
          source = "/run/qemu"
          target = "/run/qemu"

          bind_options {
            propagation = "rslave"
          }
        }
      }

      # What is asked for of the processor is a weight. Memory is a limit, beyond which migrations end: 256 MiB for each
      # peer or lane, and a rest.
      resources {
        cpu    = 200
        memory = 1024
      }
    }
  }
}
