#!/bin/sh
# Starts the stand-in for execd beside the sandbox's own command, and ends with that command's exit status.
"${EXECD:-/opt/opensandbox/execd}" GENERATION &
"$@" &
main=$!
trap 'kill -TERM "$main" 2>/dev/null; exit 0' TERM
wait "$main"
