# shellcheck shell=bash
# Sourced by the other scripts: a virtual environment with the package installed.
#   use_environment FOLDER EXTRAS [SIZE]   makes FOLDER if needed, installs what changed, activates it.
#   tell_while WHAT COMMAND ...            says WHAT and for how long, every 15 s until the command ends.
# SIZE is what a first installation downloads, for people who wait for it.
use_environment() {
  local folder=$1 extras=$2 size=${3:-1 GB or more} python=${PYTHON:-python3} wanted
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "dpp_jax needs Python 3.11 or newer; $python is $("$python" --version 2>&1)." \
      "Set PYTHON=/path/to/python3.11" >&2
    return 1
  }
  # An environment whose making was interrupted has no pip: it is made anew.
  "$folder/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$folder"
  # Install again only when the dependencies changed.
  wanted="$(cksum setup.py constraints.txt) $extras"
  if [ "$(cat "$folder/installed" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing dpp_jax$extras in $folder: pip downloads $size the first time and unpacks it," \
      "a minute or more." >&2
    tell_while "still installing" "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint constraints.txt --editable ".$extras"
    echo "$wanted" > "$folder/installed"
  fi
  # shellcheck disable=SC1091
  . "$folder/bin/activate"
}

# Runs a command that says nothing itself; its exit status is that of the command.
tell_while() {
  local what=$1 every=${DPP_TELL_SECONDS:-15} status=0 ticker
  shift
  (
    trap 'kill $(jobs -p) 2>/dev/null; exit 0' TERM
    seconds=0
    # Where this script was killed, nobody else ends the loop.
    while sleep "$every" & wait "$!" && kill -0 "$$" 2>/dev/null; do
      seconds=$((seconds + every))
      echo "… $what, $seconds s" >&2
    done
  ) &
  ticker=$!
  "$@" || status=$?
  kill "$ticker" 2>/dev/null || true
  wait "$ticker" 2>/dev/null || true
  return "$status"
}
