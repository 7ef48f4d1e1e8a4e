#!/bin/sh
# Builds all targets with Debian's Bazel (apt-get install bazel-bootstrap bazel-rules-java bazel-rules-proto) and runs
# some tests with it: `make check-bazel`, or: tests/bazel.sh PYTHON_BIN_DIR [TEST_TARGET ...]
#
# Debian's Bazel is older than modules and fetches nothing from the network, so a copy of the sources gets a workspace in
# which the repositories that MODULE.bazel and Bazel itself ask for are replaced by the rules that are built in.
set -eu
bin=$1
shift
[ $# -gt 0 ] || set -- //tests:test_accounting //tests:test_mechanisms //tests:test_statistics //tests:test_layers
command -v bazel > /dev/null || { echo "bazel is not installed: apt-get install bazel-bootstrap" >&2; exit 1; }
root=$(CDPATH='' cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
mkdir -p "$work/src" "$work/rules_python/python" "$work/rules_cc/cc" "$work/coverage"
(cd "$root" && git ls-files -z --cached --others --exclude-standard | tar -c --null -T - ) | tar -x -C "$work/src"
for rule in py_library py_binary py_test; do
  echo "$rule = native.$rule" >> "$work/rules_python/python/defs.bzl"
done
for rule in cc_binary cc_library cc_import cc_test cc_toolchain cc_toolchain_suite; do
  echo "$rule = native.$rule" >> "$work/rules_cc/cc/defs.bzl"
done
touch "$work/rules_python/WORKSPACE" "$work/rules_python/python/BUILD" "$work/rules_cc/WORKSPACE" "$work/rules_cc/cc/BUILD"
touch "$work/coverage/WORKSPACE"
echo 'filegroup(name = "coverage_report_generator", visibility = ["//visibility:public"])' > "$work/coverage/BUILD"
echo 'workspace(name = "tf_dpbn")' > "$work/src/WORKSPACE"
run() {
  command=$1
  shift
  PATH="$bin:$PATH" bazel --output_user_root="$work/out" "$command" \
    --override_repository=rules_python="$work/rules_python" --override_repository=rules_cc="$work/rules_cc" \
    --override_repository=rules_java=/usr/share/bazel/rules/java \
    --override_repository=rules_proto=/usr/share/bazel/rules/proto \
    --override_repository=remote_coverage_tools="$work/coverage" --action_env=PATH "$@"
}
cd "$work/src"
trap 'bazel --output_user_root="$work/out" shutdown; cd /; chmod -R u+w "$work"; rm -rf "$work"' EXIT
run build //...
run test --test_env=PATH --test_output=errors "$@"
