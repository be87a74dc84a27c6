# What the scripts have in common: progress, step by step. Sourced; not run.

# Unit tests, lints and the tests on a node are built with the same, so that they share what they are built from.
test_features=pericarp/fault-points

# step NAME COMMAND…: says what is done and how long it took; a failure ends the script with the step's name.
step() {
  local name=$1 start=$SECONDS status
  shift
  printf '==> %s (at %s)\n' "$name" "$(clock "$SECONDS")"
  # In a shell of its own, because within a condition a function would go on after a command that failed.
  set +e
  (set -e; "$@")
  status=$?
  set -e
  if [ "$status" != 0 ]; then
    printf '==> FAILED: %s (exit status %s, after %s)\n' "$name" "$status" "$(clock $((SECONDS - start)))" >&2
    exit "$status"
  fi
  printf '    %s: %s\n' "$name" "$(clock $((SECONDS - start)))"
}

clock() {
  printf '%d:%02d' $(($1 / 60)) $(($1 % 60))
}
