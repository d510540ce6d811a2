#!/usr/bin/env bash
# A release, step by step: release.sh plan convert evaluate sign verify push. The first step that fails ends the rest.
#
# RECIPE       recipe that is released: a .yaml of yours, or a shipped name
# BUNDLE       folder of the bundle. Default: bundle
# RUN_DIR      folder of the run, on a disk that outlives the job: the same step goes on there. Default: run
# OPTIONS      options of plan and convert, e.g. "--gpus 8". Default: none
# PLAN_OPTIONS options of plan alone, e.g. "--disk 2000". Default: none
# GATES        options of evaluate, e.g. "--max cmmd-ratio=1.2". Default: none, so nothing is refused
# SIGNING_KEY  private key, a PEM file. Default: keyless, with the identity of the CI job
# PUBLIC_KEY   its public key, or the identity of a keyless signature, which verify asks for. Default: none
# REPO         hub repository, ORG/NAME. Default: none, and push does nothing
# PUSH_OPTIONS options of push, e.g. "--private". Default: none
# ATTEMPTS     how often convert is started when resources were lost, or the machine was taken away. Default: 3
# RESULTS      folder of the JSON documents of all steps. Default: release
set -euo pipefail
: "${RECIPE:?name the recipe that is released}"
BUNDLE=${BUNDLE:-bundle} RUN_DIR=${RUN_DIR:-run} REPO=${REPO:-} RESULTS=${RESULTS:-release}
read -ra options <<< "${OPTIONS:-}"
read -ra plan_options <<< "${PLAN_OPTIONS:-}"
read -ra gates <<< "${GATES:-}"
read -ra push_options <<< "${PUSH_OPTIONS:-}"

plan() { dcgen-convert plan "$RECIPE" "${options[@]}" "${plan_options[@]}" --json > "$RESULTS/plan.json"; }

convert() {
    local attempt code
    for attempt in $(seq "${ATTEMPTS:-3}"); do
        code=0
        dcgen-convert convert "$RECIPE" "${options[@]}" -y -o "$BUNDLE" --run-dir "$RUN_DIR" --json \
            > "$RESULTS/convert.json" || code=$?
        case $code in
            4 | 143) echo "attempt $attempt ended with code $code" >&2 ;;
            *) return "$code" ;;
        esac
        sleep "${PAUSE:-60}"
    done
    return "$code"
}

evaluate() { dcgen-convert evaluate "$BUNDLE" "${gates[@]}" --json > "$RESULTS/evaluate.json"; }

sign() {
    dcgen-convert sign "$BUNDLE" ${SIGNING_KEY:+--key "$SIGNING_KEY"} ${REPO:+--repo "$REPO"} --json > "$RESULTS/sign.json"
}

verify() { dcgen-convert verify "$BUNDLE" ${PUBLIC_KEY:+--signed-by "$PUBLIC_KEY"} --json > "$RESULTS/verify.json"; }

push() {
    if [ -z "$REPO" ]; then
        echo "REPO is empty: nothing is pushed" >&2
        return
    fi
    dcgen-convert push "$BUNDLE" "$REPO" "${push_options[@]}" --json > "$RESULTS/push.json"
}

mkdir -p "$RESULTS"
for step in "$@"; do
    case $step in
        plan | convert | evaluate | sign | verify | push) ;;
        *)
            echo "$step is no step: plan convert evaluate sign verify push" >&2
            exit 2
            ;;
    esac
    echo "release: $step" >&2
    "$step"
done
