#!/bin/bash
# The first process of a host with libvirt: its own view of /usr, /etc, /run and of libvirt's folders, then
# libvirtd. Runs in a mount namespace and a network namespace of its own.
#   usage: host.sh DIR LAB UUID USER VMFERRY MADE     DIR is the host's folder, USER runs the QEMUs
# MADE is what the lab has of libvirt: `libvirt`, which is laid over the machine's own /usr, or another, a root
# file system of its own, in which libvirtd, virsh and QEMU run.
# DIR is the folder of the guests' disks on this host, too: /var/lib/libvirt/images. libvirtd is started again when it ends, with the words that are in DIR/libvirtd.words.
set -euo pipefail
dir=$1 lab=$2 uuid=$3 user=$4 vmferry=$5 made=$6
newer=/run/newer

over() { # over FOLDER LOWER...: a layer of the host's own over the folder
  local folder=$1 own=$dir/over${1//\//-}
  mkdir -p "$own/upper" "$own/work"
  mount -t overlay -o "lowerdir=$2,upperdir=$own/upper,workdir=$own/work" vmferry-lab "$folder"
}

# The machine's devices but for its KVM: where that is emulated itself, libvirt's look at its QEMU lasts minutes.
devices() {
  local device new=$dir/dev
  mkdir "$new"
  mount -t tmpfs -o mode=755 vmferry-lab "$new"
  for device in null zero full random urandom tty net/tun; do
    [ -e "/dev/$device" ] || continue
    mkdir -p "$(dirname "$new/$device")"
    : >"$new/$device"
    mount --bind "/dev/$device" "$new/$device"
  done
  # Who may use post-copy is not asked here. Its number is the kernel's choice.
  device=$(awk '$2 == "userfaultfd" { print $1 }' /proc/misc)
  [ -z "$device" ] || mknod -m 666 "$new/userfaultfd" c 10 "$device"
  for device in pts shm; do
    mkdir "$new/$device"
    mount --bind "/dev/$device" "$new/$device"
  done
  ln -s /proc/self/fd "$new/fd"
  mount --move "$new" /dev
}

# What is called by name on this host runs in the newer root.
in_newer() { # in_newer PROGRAM
  printf '#!/bin/sh\nexec chroot %s "/usr/$(basename "$(dirname "$0")")/%s" "$@"\n' "$newer" "$(basename "$1")" >"$dir/tools/$1"
  chmod 755 "$dir/tools/$1"
}

case $made in
libvirt) mount -t overlay -o "lowerdir=$lab/libvirt/usr:$lab/qemu72/usr:/usr" vmferry-lab /usr ;;
*)
  mkdir -p "$dir"/tools/{bin,sbin}
  in_newer bin/virsh
  in_newer sbin/libvirtd
  mount -t overlay -o "lowerdir=$dir/tools:/usr" vmferry-lab /usr
  ;;
esac
over /etc /etc
for folder in lib log cache; do over /var/$folder /var/$folder; done
mount -t tmpfs -o mode=755 vmferry-lab /run
devices
mkdir -p /run/lock /run/libvirt
# The agent's user need not be able to reach the checkout, and makes its folder in a place of its own.
: >/run/vmferry-bin
mount --bind "$vmferry" /run/vmferry-bin
mkdir -p /var/lib/libvirt/{images,qemu} /var/log/libvirt/qemu /var/cache/libvirt/qemu/capabilities "$lab/$made/capabilities"
# What libvirt found out about its QEMU, which takes it a while, is kept; libvirt sees by itself when it is old.
mount --bind "$lab/$made/capabilities" /var/cache/libvirt/qemu/capabilities

mount --bind "$dir" /var/lib/libvirt/images
# A letter for the guest, which asks the QEMU that executes it on which host that is.
basename "$dir" | cut -c1 | tr -d '\n' >/var/lib/libvirt/letter

have_group() { getent group "$1" >/dev/null || echo "$1:x:$2:${3:-}" >>/etc/group; }
have_user() { getent passwd "$1" >/dev/null || echo "$1:x:$2:$3::/nonexistent:/usr/sbin/nologin" >>/etc/passwd; }
have_group kvm 64053
have_group libvirt 64054 vmferry
have_group libvirt-qemu 64055 vmferry
have_group vmferry 64056
have_user libvirt-qemu 64055 64055
have_user vmferry 64056 64056
install -d -o vmferry -g vmferry -m 0755 /run/vmferry

mkdir -p /etc/libvirt
cat >/etc/libvirt/libvirtd.conf <<CONF
host_uuid = "$uuid"
unix_sock_group = "libvirt"
unix_sock_rw_perms = "0770"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_filters = "1:qemu.qemu_migration 2:qemu.qemu_monitor 3:util 4:event 3:remote 3:rpc 3:object"
log_outputs = "2:file:$dir/libvirtd.log"
CONF
cat >/etc/libvirt/qemu.conf <<CONF
user = "$user"
group = "$user"
stdio_handler = "file"
cgroup_controllers = []
namespaces = []
security_driver = "none"
CONF

own=
if [ "$made" != libvirt ]; then
  own=$newer
  mkdir -p "$dir"/newer/{upper,work} "$newer"
  mount -t overlay -o "lowerdir=$lab/$made,upperdir=$dir/newer/upper,workdir=$dir/newer/work" vmferry-lab "$newer"
  for folder in proc sys dev etc run var tmp; do mount --rbind "/$folder" "$newer/$folder"; done
fi
# Another QEMU would only be asked what it can do.
mount --bind /dev/null "$own/usr/bin/qemu-system-i386"

while :; do
  # shellcheck disable=SC2046
  libvirtd $(cat "$dir/libvirtd.words" 2>/dev/null) </dev/null >>"$dir/libvirtd.out.log" 2>&1 || true
  sleep 0.2
done
