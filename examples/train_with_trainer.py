"""LoRS with transformers.Trainer: bfloat16, gradient checkpointing and accumulation, checkpoints that resume.

`python examples/train_with_trainer.py` trains a small pruned model on Python's own documentation; `--model DIR` trains
your own pruned checkpoint. After a kill, repeat the command with `--resume`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from small_model import documentation, pruned_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, Trainer, TrainingArguments

import lors_cuda
from lors_cuda.hf import LoRSTrainerMixin, SparsityCallback
from lors_cuda.pruning import measure_sparsity

BLOCK = 128  # tokens in a sequence


class AdapterTrainer(LoRSTrainerMixin, Trainer):
    """Checkpoints of the adapter's size."""


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a pruned checkpoint with its tokenizer")
    parser.add_argument("--output", type=Path, default=Path("trainer-output"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--reentrant", action="store_true", help="the older mode of gradient checkpointing")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in --output")
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.model) if args.model else ByT5Tokenizer()
    dtype = torch.bfloat16  # of the frozen weights; the adapters are float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype) if args.model else pruned_llama(dtype=dtype)
    model = lors_cuda.get_lors_model(model, lors_cuda.LoRSConfig(r=8, lora_alpha=16))

    text = "\n".join(documentation())
    ids = tokenizer(text).input_ids
    blocks = [ids[start : start + BLOCK] for start in range(0, len(ids) - BLOCK + 1, BLOCK)]
    trainer = AdapterTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            max_steps=args.steps,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            activation_checkpointing=True,  # "gradient_checkpointing" in older transformers
            activation_checkpointing_kwargs={"use_reentrant": args.reentrant},
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_steps=max(1, args.steps // 2),
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
        processing_class=tokenizer,
        callbacks=[SparsityCallback(every=5)],
    )
    trainer.train(resume_from_checkpoint=args.resume)

    merged = lors_cuda.merge_and_unload(trainer.model)
    if trainer.is_world_process_zero():
        merged.save_pretrained(args.output / "merged")
        tokenizer.save_pretrained(args.output / "merged")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; zeros: {measure_sparsity(merged)}, in {args.output / 'merged'}")
    return losses


if __name__ == "__main__":
    main()
