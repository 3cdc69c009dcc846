# The mounts and namespaces of a Kubernetes node, which `kubernetes.rs` starts, reads from and ends.
#
# Started in the node's network namespace and cgroups, with mount, uts, ipc and cgroup namespaces of
# its own. Says the first process's id, as the starter knows it, then waits. Its environment: NAME,
# the node's name; FOLDER, its data; HIERARCHIES, what to mount cgroup1 by, if there is any.
set -euo pipefail

echo "$NAME" > /proc/sys/kernel/hostname

# This node's interfaces and cgroups; the machine's bpffs, whose folders belong to nodes.
mkdir -p "$FOLDER/sys"
mount -t sysfs sysfs "$FOLDER/sys"
mount --bind /sys/fs/bpf "$FOLDER/sys/fs/bpf"
unified=$FOLDER/sys/fs/cgroup
if [ -n "$HIERARCHIES" ]; then
    mount -t tmpfs -o mode=755 tmpfs "$unified"
    for options in $HIERARCHIES; do
        at=$unified/${options#name=}
        mkdir "$at"
        case $options in
            name=*) mount -t cgroup -o "none,$options" cgroup "$at" ;;
            *) mount -t cgroup -o "$options" cgroup "$at" ;;
        esac
    done
    unified=$unified/unified
    mkdir "$unified"
fi
mount -t cgroup2 cgroup2 "$unified"
# Controllers are for cgroups whose parent has no processes.
echo $$ > "$unified/host/cgroup.procs"
for controller in $(cat "$unified/cgroup.controllers"); do
    echo "+$controller" > "$unified/cgroup.subtree_control"
done
mount --move "$FOLDER/sys" /sys

# What containerd, kubelet and plugins keep at fixed places.
for folder in /run /var/lib /var/log; do
    mount -t tmpfs -o mode=755 tmpfs "$folder"
done
mkdir -p /run/lock /run/netns /var/log/pods /var/log/containers
mount --make-rshared /

# shellcheck disable=SC2016
exec unshare --pid --fork --kill-child bash -euo pipefail -c '
    read -r pid _ < /proc/self/stat
    mount -t proc proc /proc
    # What kubelet wants of the kernel, shown to it without touching the machine.
    for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 \
            kernel/panic_on_oops=1 kernel/keys/root_maxkeys=1000000 \
            kernel/keys/root_maxbytes=25000000; do
        file=$FOLDER/settings/${setting%=*}
        mkdir -p "${file%/*}"
        echo "${setting#*=}" > "$file"
        mount --bind "$file" "/proc/sys/${setting%=*}"
    done
    echo "$pid"
    # A shell that waits also buries what other processes leave.
    sleep infinity &
    wait $!
'
