#!/usr/bin/env bash
# Counts words. SKILL.md tells how it is called.
set -euo pipefail

usage() {
  echo "usage: count.sh [-n NUMBER] FILE|-" >&2
  exit 2
}

top=10
while getopts n: option; do
  case $option in
    n) top=$OPTARG ;;
    *) usage ;;
  esac
done
shift $((OPTIND - 1))
[[ $# -eq 1 && $top =~ ^[1-9][0-9]*$ ]] || usage

file=$1
[[ $file == - ]] && file=/dev/stdin
[[ -r $file ]] || { echo "count.sh: cannot read $1" >&2; exit 2; }

output=${OUTPUT:-/output}
text=$(mktemp)
trap 'rm -f "$text"' EXIT
cat "$file" >"$text"

# A word is what stands between spaces and punctuation. Bytes beyond ASCII are left alone, so UTF-8 stays whole.
LC_ALL=C tr -s '[:space:][:punct:]' '\n' <"$text" |
  LC_ALL=C tr '[:upper:]' '[:lower:]' |
  awk 'NF { count[$0]++ } END { for (word in count) print count[word] "\t" word }' |
  LC_ALL=C sort -k1,1nr -k2 >"$output/words.tsv"

awk -F '\t' -v lines="$(wc -l <"$text")" '
  { words += $1 }
  END { printf "%d lines, %d words, %d different ones\n", lines, words, NR }
' "$output/words.tsv"

echo
head -n "$top" "$output/words.tsv" | awk -F '\t' '{ printf "%6d  %s\n", $1, $2 }'
