"""What somebody meant who wrote a name that does not exist: the nearest name, or what other
trainers call the same thing."""

import difflib
from collections.abc import Collection, Iterable

_CALLED = {
    "model.vocab_size": "vocab vocabulary n_vocab vocabulary_size padded_vocab_size",
    "model.dim": "hidden_size d_model n_embd n_embed embed_dim embedding_dim emb_dim width",
    "model.layers": "num_layers n_layers n_layer num_hidden_layers num_decoder_layers depth",
    "model.heads": "num_heads n_heads n_head num_attention_heads num_query_heads",
    "model.kv_heads": "num_kv_heads n_kv_heads n_kv_head num_key_value_heads num_query_groups",
    "model.head_dim": "head_size kv_channels d_head",
    "model.ffn_dim": "intermediate_size ffn_hidden_size ffn_size mlp_dim d_ff feed_forward_dim",
    "model.rope_theta": "rope_base rotary_base",
    "model.norm_eps": "rms_norm_eps layernorm_epsilon layer_norm_eps rms_eps",
    "model.tie_embeddings": "tie_word_embeddings tied_embeddings weight_tying share_embeddings",
    "model.init_std": "initializer_range init_method_std init_scale",
    "data.source": "dataset dataset_name dataset_path data_path data_dir train_file train_data",
    "data.tokenizer": "tokenizer_name tokenizer_path tokenizer_model tokenizer_type",
    "data.sequence_length": "seq_len seq_length max_seq_len max_seq_length max_length block_size "
    "context_length n_ctx max_position_embeddings context_window",
    "data.packing": "pack sample_packing packed",
    "data.validation_source": "val_source validation_file eval_file eval_dataset val_data",
    "data.prefetch": "num_workers prefetch_factor dataloader_num_workers",
    "train.steps": "max_steps num_steps total_steps train_steps training_steps max_iters "
    "train_iters num_iters iterations",
    "train.steps, which counts updates, not epochs": "epoch epochs num_epochs max_epochs n_epochs "
    "num_train_epochs",
    "train.batch_size": "batch global_batch global_batch_size train_batch_size bs",
    "train.batch_size, which is of all devices and microbatches together": "batch_size_per_device "
    "per_device_batch_size per_device_train_batch_size device_batch_size local_batch_size "
    "micro_batch_size microbatch_size train_micro_batch_size_per_gpu",
    "train.microbatches": "gradient_accumulation_steps grad_accum_steps grad_accum accum_steps "
    "gradient_accumulation accumulation_steps accumulate_grad_batches num_microbatches",
    "train.seed": "random_seed data_seed manual_seed",
    "train.eval_every": "eval_steps eval_interval eval_freq val_check_interval evaluation_steps",
    "train.eval_batches": "eval_iters val_batches limit_val_batches",
    "train.z_loss": "z_loss_weight z_loss_multiplier",
    "optimizer.name": "optim optimizer_type optimizer_name opt",
    "optimizer.learning_rate": "lr base_lr max_lr peak_lr init_lr peak_learning_rate",
    "optimizer.schedule": "lr_schedule lr_scheduler lr_scheduler_type scheduler lr_decay_style",
    "optimizer.warmup_steps": "warmup warmup_iters num_warmup_steps lr_warmup_steps warmup_ratio",
    "optimizer.min_learning_rate": "min_lr lr_min eta_min end_lr end_learning_rate final_lr",
    "optimizer.weight_decay": "wd",
    "optimizer.beta1": "b1 adam_beta1 momentum",
    "optimizer.beta2": "b2 adam_beta2",
    "optimizer.eps": "adam_epsilon adam_eps epsilon",
    "optimizer.clip_norm": "max_grad_norm grad_clip gradient_clip gradient_clipping clip_grad "
    "clip_grad_norm gradient_clip_val max_norm",
    "precision.compute": "dtype bf16 fp16 mixed_precision torch_dtype compute_dtype "
    "activation_dtype",
    "precision.params": "param_dtype params_dtype weight_dtype master_dtype",
    "precision.grad_reduce": "reduce_dtype grad_dtype grad_reduce_dtype",
    "memory.remat": "gradient_checkpointing activation_checkpointing activation_checkpoint "
    "recompute remat_policy recompute_granularity use_remat",
    "memory.offload": "cpu_offload offload_optimizer activation_offload",
    "parallel.sequence_parallel": "megatron_sp enable_sequence_parallel",
    "parallel.optimizer_sharding": "zero zero1 zero_stage use_distributed_optimizer",
    "parallel.schedule": "pipeline_schedule pp_schedule",
    "parallel.chunks": "virtual_pipeline_stages virtual_stages interleave",
    "attention.implementation": "attn_implementation attn_impl flash_attention use_flash_attn",
    "compile.cache": "compilation_cache compilation_cache_dir jax_compilation_cache_dir",
    "checkpoint.every": "save_steps save_every save_interval save_freq ckpt_every ckpt_interval "
    "checkpoint_interval checkpoint_period checkpoint_every",
    "checkpoint.keep": "save_total_limit keep_last max_to_keep keep_last_n",
    "checkpoint.restore": "resume resume_from resume_from_checkpoint init_from load load_path "
    "load_checkpoint restore_from",
    "log.every": "logging_steps log_interval log_every log_freq log_period print_every",
    "log.tensorboard": "report_to use_tensorboard tensorboard_dir",
    "--workdir": "output_dir output out_dir save_dir checkpoint_dir run_dir log_dir workspace",
    "--cpu_devices": "num_devices host_devices fake_devices simulated_devices num_cpu_devices",
    "--num_processes": "nnodes world_size num_hosts",
    "--process_id": "node_rank process_index",
    "--coordinator": "master_addr coordinator_address",
    "--mesh.tensor": "tp tp_size tensor_parallel tensor_parallel_size tensor_parallelism "
    "tensor_model_parallel_size model_parallel model_parallel_size mp ici_tensor_parallelism",
    "--mesh.data": "dp dp_size data_parallel data_parallel_size ddp dp_replicate "
    "data_parallel_replicate_degree ici_data_parallelism",
    "--mesh.fsdp": "fsdp_size zero3 fully_sharded dp_shard shard data_parallel_shard_degree "
    "ici_fsdp_parallelism",
    "--mesh.pipeline": "pp pp_size pipe pipeline_parallel pipeline_parallel_size "
    "pipeline_model_parallel_size stages num_stages",
    "--mesh.sequence": "cp cp_size sp context_parallel context_parallel_size seq "
    "sequence_parallel_size",
    "--mesh.expert": "ep ep_size experts expert_parallel expert_parallel_size",
}
"""What others call it, after what it is called here: a field, or a flag; maybe with a remark."""

ALIASES = {alias: ours for ours, aliases in _CALLED.items() for alias in aliases.split()}


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """` Did you mean ...?` for the closest of `names`, or the whole list when none is close;
    `prefix` is put before."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return (
        f" Did you mean {prefix}{close[0]}?"
        if close
        else f" Known: {', '.join(prefix + name for name in names)}."
    )


def meant_field(path: str, fields: Collection[str], axes: Collection[str]) -> str:
    """The hint for a dotted config field that does not exist: the field of that name in another
    group, a flag for the size of an axis, the name of another trainer, else the nearest."""
    groups = {known.rpartition(".")[0] for known in fields}
    group, _, name = path.rpartition(".")
    if namesakes := [known for known in fields if known.rpartition(".")[2] == name]:
        return f" Did you mean {' or '.join(namesakes)}?"
    if name in axes and group in ("", "mesh", "parallel"):
        return f" The size of an axis is a flag of its own: --mesh.{name}=N"
    if other := ALIASES.get(name.lower().replace("-", "_")):
        return f" Did you mean {other}?"
    if group in groups:
        siblings = [
            known.removeprefix(group + ".") for known in fields if known.rpartition(".")[0] == group
        ]
        return nearest(name, siblings, prefix=group + ".")
    return nearest(group or path, sorted({known.partition(".")[0] for known in groups}))


def meant_flag(
    name: str, flags: Collection[str], fields: Collection[str], axes: Collection[str]
) -> str:
    """The hint for a flag, without its dashes, that does not exist; `fields` is empty for a command
    that takes no config."""
    own, _, _ = ALIASES.get(name.lower().replace("-", "_"), "").partition(",")
    if own.removeprefix("--") in flags or own.startswith("--mesh."):
        return f" Did you mean {own}?"
    if name in axes or name.removeprefix("mesh_") in axes:
        return f" Did you mean --mesh.{name.removeprefix('mesh_')}?"
    close = difflib.get_close_matches(name, flags, n=1, cutoff=0.75)
    if close or not fields:
        return nearest(name, close or flags, prefix="--")
    if name in fields:
        return f" Did you mean --config.{name}?"
    if (hint := meant_field(name, fields, axes)).startswith(" Did you mean"):
        return hint.replace("mean ", "mean --config.", 1).replace("or ", "or --config.")
    return nearest(name, flags, prefix="--")
