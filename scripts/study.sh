#!/usr/bin/env bash
# What distillation is worth on the quickstart's pair, and what it depends on: docs/study.md tells what came out.
#
#     bash scripts/study.sh              # all of it: some two hours on two cores; what is done is not run again
#     bash scripts/study.sh main lr      # some of its parts
#     python scripts/study.py            # tables and figures of what there is
#
# More runs at a time: JOBS=4. More seeds: SEEDS=0,1,2,3. Another folder than runs/study: STUDY=... Longer, on GPUs,
# with what else is to be set of all runs: STEPS=1200 MORE="device=cuda epochs=20".
set -euo pipefail

study=${STUDY:-runs/study}
few="seed=${SEEDS:-0,1,2}"
steps=${STEPS:-120}
read -ra more <<< "${MORE:-}"
parts=${*:-main tuned compute ratio lr divergence temperature plain size hidden start}

run() {  # folder, recipe, settings
    local folder=$1 recipe=$2
    shift 2
    kdtune sweep "$recipe" --config quickstart --jobs "${JOBS:-2}" "${common[@]}" "$@" output_dir="$study/$folder"
}

once() {  # folder, recipe, settings: a model that other runs start from
    local folder=$1 recipe=$2
    shift 2
    [ -d "$study/$folder/model" ] || kdtune run "$recipe" --config quickstart "$@" output_dir="$study/$folder"
}

quiet=("sample_prompts=[]" dataset_val.split=null run_val_every_n_steps=0)
common=("${quiet[@]}" max_steps="$steps" ${more[@]+"${more[@]}"})
every="run_val_every_n_steps=$((steps / 6))"

main() {  # the teacher's word against the labels', step by step
    run main knowledge_distillation seed=0,1,2,3,4 kd_ratio=1,0 "$every"
}

tuned() {  # the same with a learning rate that is better for both
    run tuned knowledge_distillation seed=0,1,2,3,4 kd_ratio=1,0 optimizer.lr=1e-3 "$every"
}

compute() {  # labels alone for as long as the steps with a teacher take, of which each is 1.58 of theirs
    run compute knowledge_distillation $few kd_ratio=0 max_steps=$((steps * 19 / 12)) optimizer.lr=2e-3,1e-3
}

ratio() {
    run ratio knowledge_distillation $few kd_ratio=0.25,0.5,0.75
}

lr() {  # main and tuned have the two between
    run lr knowledge_distillation $few kd_ratio=0,1 optimizer.lr=5e-4,4e-3
}

divergence() {  # at both learning rates, of which some may bear the higher one less than others
    local names=kd_loss.name=reverse_kl,jsd,symmetric_kl,skew_forward_kl,skew_reverse_kl,total_variation
    run divergence knowledge_distillation $few $names
    run divergence_tuned knowledge_distillation $few $names optimizer.lr=1e-3
}

temperature() {
    run temperature knowledge_distillation $few kd_loss.temperature=0.5,2,4
}

# Another task on the same text, which the embedded teacher has not learned: to write the question to an answer.
task="Answer: {answer}"$'\n'"Question: "
task=("dataset.prompt_template=$task" "dataset_val.prompt_template=$task" dataset.column_map.output=question \
    dataset_val.column_map.output=question)

plain() {  # teacher and student with the task before them for the first time, or fine-tuned on it
    local keep="[0,3]" asset='${asset:quickstart/teacher}'
    local new=(overwrite_output_dir=true "${quiet[@]}" "${task[@]}" checkpointer.random_weights=false epochs=1 save_every_n_steps=0)
    once models/student prune depth.num_layers=null depth.importance=null "depth.keep_layers=$keep"
    once models/task_teacher finetune "${new[@]}" max_steps=150 optimizer.lr=1e-3 lr_scheduler.num_warmup_steps=10
    once models/task_student finetune "${new[@]}" max_steps=120 optimizer.lr=2e-3 lr_scheduler.num_warmup_steps=10 \
        gradient_accumulation_steps=2 checkpointer.checkpoint_dir="$study/models/student/model"
    run plain knowledge_distillation $few "${task[@]}" checkpointer.keep_layers=null \
        teacher_checkpointer.checkpoint_dir="$asset,$study/models/task_teacher/model" \
        checkpointer.checkpoint_dir="$study/models/student/model,$study/models/task_student/model"
    run plain_labels knowledge_distillation $few "${task[@]}" checkpointer.keep_layers=null kd_ratio=0 \
        teacher_checkpointer.checkpoint_dir="$study/models/task_teacher/model" \
        checkpointer.checkpoint_dir="$study/models/student/model,$study/models/task_student/model"
}

size() {  # students of one, two and three of the teacher's four layers
    run size knowledge_distillation $few kd_ratio=1,0 "checkpointer.keep_layers=[0],[0,1,3]"
}

# The student's layers 0 and 1 are the teacher's 0 and 3: the first stands for three of them.
pairs="pairs: [{student: model.layers.0, teacher: model.layers.2}, {student: model.layers.1, teacher: model.layers.3}]"
hidden_states="{name: normalized_mse, $pairs}"
layer_by_layer="{name: normalized_mse, inputs: teacher, $pairs}"

hidden() {  # the logits, the hidden states, or both; and each layer by itself
    run hidden knowledge_distillation $few kd_loss.weight=1,0 "hidden_loss=$hidden_states"
    run layerwise knowledge_distillation $few kd_loss.weight=0 "hidden_loss=$layer_by_layer"
}

start() {  # the same from random weights, and from a narrower student instead of a shorter one
    run random knowledge_distillation $few checkpointer.random_weights=true kd_ratio=0,1
    run random_hidden knowledge_distillation $few checkpointer.random_weights=true "hidden_loss=$hidden_states" kd_loss.weight=1,0
    once models/narrow prune depth.num_layers=null depth.importance=null width.intermediate_size=128
    run narrow knowledge_distillation $few kd_ratio=1,0 checkpointer.keep_layers=null \
        checkpointer.checkpoint_dir="$study/models/narrow/model"
}

for part in $parts; do
    "$part"
done
