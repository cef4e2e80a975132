"""LoRS with TRL's SFTTrainer: a converted model, and checkpoints of the adapter's size.

`python examples/train_with_trl.py` trains a small pruned model on Python's own documentation.
It needs trl (`pip install trl`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from small_model import documentation, pruned_llama
from transformers import ByT5Tokenizer
from trl import SFTConfig, SFTTrainer

import lors_cuda
from lors_cuda.hf import LoRSTrainerMixin, SparsityCallback


class AdapterSFTTrainer(LoRSTrainerMixin, SFTTrainer):
    """Checkpoints of the adapter's size."""


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("trl-output"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in --output")
    args = parser.parse_args(argv)

    model, tokenizer = pruned_llama(), ByT5Tokenizer()  # or from_pretrained of your pruned checkpoint
    model = lors_cuda.get_lors_model(model, lors_cuda.LoRSConfig(r=8, lora_alpha=16))

    trainer = AdapterSFTTrainer(
        model=model,  # converted already: no peft_config
        args=SFTConfig(
            output_dir=args.output,
            max_steps=args.steps,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_length=128,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_steps=max(1, args.steps // 2),
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"text": text} for text in documentation()]),
        processing_class=tokenizer,
        callbacks=[SparsityCallback(every=5)],
    )
    trainer.train(resume_from_checkpoint=args.resume)

    trainer.save_model(args.output / "adapter")  # for load_adapter or `lors-cuda merge`
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; the adapter is in {args.output / 'adapter'}")
    return losses


if __name__ == "__main__":
    main()
