# What the launch scripts share about arguments: how to find one, and how to write them down. Runs in bash 3.2 too.
# shellcheck shell=bash

# The value of option $1 among the arguments after it, as "--option VALUE" or "--option=VALUE"; the last one counts.
value_of() {
  local option=$1 value=''
  shift
  while (($#)); do
    case $1 in
      "$option") value=${2:-} ;;
      "$option"=*) value=${1#*=} ;;
    esac
    shift
  done
  printf '%s' "$value"
}

# The words as a shell reads them, in any bash.
quoted() {
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  printf '%s' "${line# }"
}
