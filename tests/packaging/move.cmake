# SPDX-License-Identifier: MIT
#
# cmake -D from=<folder> -D to=<folder> -P move.cmake
#
# Moves a folder, in place of what was there.

file(REMOVE_RECURSE "${to}")
file(RENAME "${from}" "${to}")
