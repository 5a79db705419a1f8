# The step of action.yml: one run of the gate, its reports, and its own exit status.
set -uo pipefail
arguments=()
if [ -n "${SQUEEZE_BUDGET:-}" ]; then arguments+=(--budget "$SQUEEZE_BUDGET"); fi
read -r -a more <<<"${SQUEEZE_ARGS:-}"
arguments+=("${more[@]}")
while IFS= read -r model; do
  if [ -n "$model" ]; then arguments+=("$model"); fi
done <<<"${SQUEEZE_MODELS:-}"
folder="${RUNNER_TEMP:-$(mktemp -d)}"
report="$folder/squeeze-check.md"
json="$folder/squeeze-check.json"
squeeze check "${arguments[@]}" --json --markdown-file "$report" >"$json"
status=$?
if [ -f "$report" ]; then cat "$report"; fi
{
  echo "passed=$([ "$status" -eq 0 ] && echo true || echo false)"
  echo "report=$report"
  echo "json=$json"
} >>"${GITHUB_OUTPUT:-/dev/null}"
exit "$status"
