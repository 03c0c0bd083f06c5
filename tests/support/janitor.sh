# Ends one lab: waits until the test that holds the other end of standard input is done or dead,
# then kills what still runs in the lab's namespaces, removes them and the lab's folder. It outlives
# the test, so that a killed test or a Ctrl-C leaves nothing behind. Who waits for it waits until the folder
# has gone from its place: its images are then removed in its own time, which takes seconds where the file
# system discards what is freed.
#   usage: sh -s DIR PREFIX       DIR/keep: leave everything as it is
trap '' INT TERM HUP
dir=$1 prefix=$2
cat >/dev/null
[ ! -e "$dir/keep" ] || exit 0
namespaces=$(ip netns list | awk -v prefix="$prefix" 'index($1, prefix) == 1 { print $1 }')
for namespace in $namespaces; do
  pids=$(ip netns pids "$namespace")
  # shellcheck disable=SC2086
  [ -z "$pids" ] || kill -KILL $pids 2>/dev/null
done
for namespace in $namespaces; do ip netns del "$namespace"; done
awk -v dir="$dir/" 'index($2, dir) == 1 { print $2 }' /proc/mounts | while read -r mount; do umount -l "$mount"; done
grep -l "^$dir/" /sys/block/loop*/loop/backing_file 2>/dev/null | while read -r file; do
  device=${file#/sys/block/}
  losetup -d "/dev/${device%%/*}" 2>/dev/null
done
labs=${dir%/*}
mv "$dir" "$labs/vmferry-gone-${dir##*/}" || exit
# Of a janitor that was killed at this.
find "$labs" -maxdepth 1 -name 'vmferry-gone-*' -mmin +120 -exec rm -rf {} + 2>/dev/null
exec rm -rf "$labs/vmferry-gone-${dir##*/}"
