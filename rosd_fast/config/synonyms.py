"""What other trainers call our options, so that a name from there leads to the right one.

Names are compared without case, dashes and underscores, and also by their last part: verl's
`actor_rollout_ref.rollout.n` is `n`.
"""

from __future__ import annotations

from collections.abc import Mapping

OPTIONS: Mapping[str, str] = {
    "model": "model_name_or_path model_name model_path base_model model_id hf_model pretrain "
    "pretrained pretrained_model student student_model actor_model policy_model",
    "method": "algorithm algo adv_estimator advantage_estimator objective trainer_type",
    "preset": "recipe",
    "config": "config_file config_path yaml_file",
    "like": "copy_of same_as based_on",
    "resume": "resume_from_checkpoint resume_from resume_from_path resume_path resume_mode "
    "resume_run load_checkpoint load_from_checkpoint load_path ckpt_path continue_from",
    "dtype": "bf16 fp16 fp32 bfloat16 float16 half precision torch_dtype mixed_precision "
    "model_dtype param_dtype",
    "device": "cuda cpu use_cpu no_cuda use_cuda",
    "seed": "random_seed rng_seed data_seed",
    "steps": "max_steps num_steps total_steps total_training_steps num_train_steps train_steps "
    "max_train_steps n_steps iterations max_iterations max_iters iters",
    "epochs": "epoch num_train_epochs num_epochs total_epochs max_epochs n_epochs train_epochs "
    "num_episodes",
    "out": "output output_dir output_path output_folder out_dir save_dir save_path log_dir "
    "logging_dir results_dir run_dir checkpoint_dir ckpt_dir default_local_dir",
    "name": "run_name run_id experiment experiment_name exp_name exp_id job_name",
    "dump_rollouts": "log_completions save_completions dump_completions save_rollouts "
    "log_samples rollout_data_dir",
    "data.train data.source": "data dataset datasets dataset_name dataset_path train train_file "
    "train_files train_data train_dataset train_path training_data data_file data_files data_path "
    "data_dir prompt_data prompts input input_file file",
    "data.dev": "dev eval_dataset eval_data eval_file eval_files eval_path dev_file dev_data val "
    "val_file val_files val_data val_dataset validation validation_file validation_files "
    "validation_data test_file test_files test_data test_dataset",
    "data.verifier": "reward reward_fn reward_func reward_funcs reward_function reward_model "
    "reward_manager custom_reward_function verifier_name grader scorer scoring_function "
    "score_function rule_reward",
    "data.answer_instruction": "answer_format format_instruction instruction prompt_suffix",
    "data.columns.prompt": "prompt_key prompt_column question_key question_column input_key "
    "input_column text_column prompt_field",
    "data.columns.answer": "answer_key answer_column label_key label_column target_column "
    "answer_field ground_truth solution_column",
    "verify.workers": "num_workers reward_workers num_verifiers",
    "verify.timeout_s": "reward_timeout verifier_timeout",
    "chat.student.system": "system system_prompt system_message",
    "chat.student.template": "chat_template prompt_template",
    "chat.kwargs": "chat_template_kwargs apply_chat_template_kwargs enable_thinking thinking "
    "reasoning_effort",
    "sample.problems_per_step": "batch_size batch bs train_batch_size global_batch_size "
    "per_device_train_batch_size rollout_batch_size generation_batch_size gen_batch_size "
    "num_prompts prompts_per_step num_prompts_per_step prompts_per_batch problems_per_batch",
    "sample.group_size samples": "num_generations num_generation generations_per_prompt rollouts "
    "num_rollouts rollout_n rollouts_per_prompt rollouts_per_problem rollouts_per_example n "
    "n_samples num_samples n_samples_per_prompt samples_per_prompt samples_per_problem "
    "num_completions num_return_sequences g k",
    "sample.max_new_tokens max_new_tokens": "max_completion_length max_completion_tokens "
    "completion_length max_response_length response_length max_tokens max_gen_length "
    "max_generation_length generate_max_len max_output_tokens max_output_length max_length_new",
    "sample.max_prompt_tokens": "max_prompt_length prompt_length prompt_max_len prompt_max_length "
    "max_input_length max_source_length",
    "sample.max_new_tokens sample.max_prompt_tokens max_new_tokens": "max_length max_len "
    "max_seq_length max_seq_len seq_length sequence_length max_sequence_length max_model_len "
    "context_length",
    "sample.temperature temperature": "temp temperature sampling_temperature",
    "sample.top_p top_p": "top_p nucleus",
    "sample.top_k": "top_k",
    "select.threshold threshold": "success_threshold reward_threshold correct_threshold",
    "select.drop_zero_variance": "dynamic_sampling filter_groups filter_zero_variance "
    "drop_zero_std",
    "reflect.max_new_tokens": "max_reflection_tokens max_reflection_length reflection_tokens",
    "teacher.model": "teacher teacher_model teacher_model_name_or_path teacher_name teacher_path",
    "teacher.kind": "teacher_update teacher_regularization sync_ref_model",
    "teacher.ema_rate": "ema ema_decay ema_alpha teacher_ema teacher_update_rate "
    "ref_model_mixup_alpha",
    "loss.divergence": "loss_type distill_loss distillation_loss divergence_type kl_type",
    "loss.beta": "jsd_beta mixture_weight jsd_alpha",
    "loss.top_k": "distillation_topk distill_topk topk_logits",
    "loss.importance_clip": "is_clip tis tis_threshold importance_sampling_cap "
    "vllm_importance_sampling_cap rollout_is_threshold",
    "loss.policy_weight": "policy_loss_weight pg_weight rl_weight",
    "loss.distill_weight": "distill_loss_weight kd_weight distillation_weight",
    "policy.advantage": "scale_rewards norm_adv_by_std_in_grpo normalize_advantages",
    "policy.clip_low policy.clip_high": "epsilon clip_range clip_ratio clip_eps "
    "clip_epsilon eps_clip ppo_clip",
    "policy.clip_low policy.clip_high optim.grad_clip": "clip clipping",
    "policy.clip_low": "epsilon_low clip_ratio_low cliprange_low eps_clip_low",
    "policy.clip_high": "epsilon_high clip_ratio_high cliprange_high eps_clip_high",
    "policy.dual_clip": "clip_ratio_c delta",
    "policy.normalize": "loss_agg_mode loss_normalization",
    "policy.mask_truncated": "mask_truncated_completions overlong_filtering",
    "policy.entropy_weight": "entropy entropy_coef entropy_coeff entropy_bonus ent_coef",
    "optim.lr": "lr learning_rate actor_lr actor_learning_rate policy_lr student_lr base_lr "
    "max_lr peak_lr",
    "optim.schedule": "scheduler scheduler_type lr_scheduler lr_scheduler_type lr_schedule "
    "lr_decay_style warmup_style lr_decay",
    "optim.warmup_steps": "warmup warmup_iters num_warmup_steps lr_warmup_steps lr_warmup_iters",
    "optim.warmup_frac": "warmup_ratio warmup_fraction lr_warmup_ratio lr_warmup_steps_ratio",
    "optim.min_lr_frac": "min_lr min_lr_ratio min_learning_rate",
    "optim.weight_decay": "wd weight_decay_rate l2",
    "optim.betas": "adam_betas adam_beta adam_beta1 adam_beta2 beta1 beta2",
    "optim.eps": "adam_eps adam_epsilon",
    "optim.grad_clip": "max_grad_norm grad_norm max_norm clip_grad clip_grad_norm grad_clip_norm "
    "gradient_clip gradient_clipping gradient_clip_val gradient_clip_norm",
    "optim.kind": "optim optimizer optimizer_type optimizer_name optim_type",
    "optim.trainable": "freeze unfreeze trainable_params trainable_parameters",
    "lora.rank": "lora lora_r lora_rank lora_dim use_lora use_peft peft r",
    "lora.alpha": "lora_alpha",
    "lora.targets": "lora_targets lora_target_modules target_modules lora_modules",
    "learner.activation_checkpointing": "gradient_checkpointing enable_gradient_checkpointing "
    "activation_checkpoint grad_checkpointing grad_checkpoint recompute checkpoint_activations",
    "learner.liger": "use_liger use_liger_kernel liger_kernel",
    "eval.every": "eval_every eval_steps eval_freq eval_interval eval_frequency eval_strategy "
    "evaluation_strategy test_freq test_interval val_every val_interval val_check_interval",
    "eval.samples samples": "eval_n val_n eval_samples num_eval_samples n_samples_per_eval_prompt "
    "val_kwargs.n",
    "eval.problems problems": "max_eval_samples eval_size max_val_samples limit_val_batches",
    "problems": "limit max_samples num_examples max_problems num_problems",
    "engine.max_rows": "eval_batch_size per_device_eval_batch_size val_batch_size "
    "eval.batch_size max_num_seqs",
    "checkpoint.every": "save_every save_steps save_freq save_interval save_frequency "
    "save_strategy checkpoint_interval ckpt_every ckpt_interval checkpointing_steps",
    "checkpoint.keep_last": "save_total_limit max_to_keep max_ckpt_num max_checkpoints",
    "checkpoint.keep_best": "save_best load_best_model_at_end",
    "engine.kind": "rollout_backend inference_backend inference_engine rollout_engine sglang "
    "use_sglang",
    "engine.urls": "server_url server_urls base_url vllm_server_host",
    "engine.one_step_ahead": "async_training max_async_level one_step_off off_policy_steps",
}
"""The options of ours, the more telling one first -> what others call them. A command names all of
these options that it has."""

ADVICE: Mapping[str, str] = {
    "beta kl kl_beta kl_coef kl_coeff kl_weight kl_penalty kl_loss kl_loss_coef kl_ctrl use_kl "
    "use_kl_loss init_kl_coef ref_kl ref_model reference_model": "loss.beta is the teacher's "
    "weight in the mixture of the divergence jsd; a penalty on leaving the initial weights is "
    "loss.distill_weight with method grpo",
    "gradient_accumulation_steps gradient_accumulation grad_accumulation grad_accum "
    "grad_accum_steps accumulate_grad_batches accumulation_steps": "Gradients are accumulated by "
    "themselves, over micro-batches of pack.max_tokens tokens",
    "micro_batch_size micro_batch micro_train_batch_size ppo_micro_batch_size "
    "ppo_micro_batch_size_per_gpu ppo_max_token_len_per_gpu max_tokens_per_gpu "
    "log_prob_micro_batch_size_per_gpu": "pack.max_tokens is the size of a micro-batch, in tokens",
    "mini_batch_size ppo_mini_batch_size num_mini_batches": "A "
    "step's problems are split into optim.updates_per_step mini-batches, each with an update",
    "ppo_epochs num_iterations num_ppo_epochs updates_per_batch": "A step's rollouts are trained "
    "on once; optim.updates_per_step splits them into several updates",
    "val_ratio val_size val_split validation_split validation_ratio test_size test_ratio "
    "eval_split dev_size dev_frac dev_split split_ratio holdout": "To hold out a share of the "
    "training problems, set data.dev to 10%",
    "world_size gpus n_gpus num_devices devices nproc nproc_per_node n_gpus_per_node "
    "num_gpus_per_node gpus_per_node nnodes num_nodes num_processes num_machines "
    "data_parallel_size dp_size": "torchrun sets the number of ranks: "
    "torchrun --nproc-per-node 8 -m rosd_fast train ... (docs/scaling.md)",
    "deepspeed deepspeed_config ds_config zero zero_stage fsdp fsdp_config accelerate "
    "accelerate_config use_fsdp": "torchrun is enough: it starts the ranks, over which weights and "
    "optimizer are sharded (docs/scaling.md)",
    "tensor_parallel_size tensor_model_parallel_size tp tp_size vllm_tensor_parallel_size": "The "
    "servers' own arguments are in engine.server_args, as in --tp-size 2",
    "gpu_memory_utilization vllm_gpu_memory_utilization mem_fraction_static": "The servers' own "
    "arguments are in engine.server_args, as in --mem-fraction-static 0.8",
    "vllm use_vllm vllm_mode": "Servers are SGLang's: set engine.kind to sglang",
    "logging log_every log_steps log_interval logging_steps logging_strategy report_to log_with "
    "logger loggers wandb use_wandb wandb_project wandb_name project project_name tensorboard "
    "use_tensorboard trackio mlflow": "Every step is written to metrics.jsonl in the run folder, "
    "and drawn in its plots/",
}
"""Names that no option answers to -> what to do instead, in words that begin a sentence."""
