#!/usr/bin/env bash
# Train the embedded model: emoji, from nothing, on two CPU cores. Everything goes to build/emoji.
#
#   npm pack emoji-datasource-google@16.0.0
#   bash tpu_scripts/train_tiny/train.sh emoji-datasource-google-16.0.0.tgz
#
# Stopped and started again, each part goes on from its last checkpoint, and those that are done are passed over.
set -euo pipefail
cd "$(dirname "$0")/../.."
recipe=tpu_scripts/train_tiny work=build/emoji

# What needs one core has one; a network's step on two threads takes longer than half of that on one.
core() { if command -v taskset > /dev/null; then taskset -c "$1" "${@:2}"; else "${@:2}"; fi; }
train() { [ -e "$work/$2/model" ] || core "$3" kandinsky-jax train "$1" "$recipe/$2.toml"; }

[ -e $work/data/views.tar ] || python $recipe/pictures.py "$1" $work/data
[ -e $work/first/kandinsky-2-2-decoder ] || python $recipe/models.py $work/data $work/first

train movq movq 0 &
movq=$!
train clip clip 1
train prior prior 1
wait $movq
train decoder decoder 0,1
python $recipe/models.py --widen $work/decoder/model $work/first
train decoder inpaint 0 &
inpaint=$!
train decoder depth 1
wait $inpaint
[ -e $work/tiny/NOTICE ] || python $recipe/assemble.py $work $work/tiny
train distill-decoder fast 0,1
python $recipe/assemble.py --fast $work $work/tiny
