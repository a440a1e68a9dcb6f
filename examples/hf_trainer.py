"""Distil from a cache with the Hugging Face Trainer:  python examples/hf_trainer.py out/cache STUDENT NEW_FOLDER [STEPS]"""

import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import ddk_pipe

BATCH, GAMMA = 4, 0.2


class DistillTrainer(Trainer):
    """The Trainer's own loop; data in the order of the domain weights, loss from the cached targets."""

    def get_train_dataloader(self):
        data = self.train_dataset
        steps = self.args.max_steps
        order = ddk_pipe.DomainBatches(data, batch_windows=BATCH, steps=steps, seed=self.args.seed)
        return DataLoader(data, batch_sampler=order, collate_fn=ddk_pipe.collate)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        documents = {name: inputs[name] for name in ("input_ids", "position_ids")}
        hidden = model.base_model(**documents, use_cache=False).last_hidden_state
        loss = ddk_pipe.linear_sparse_kd(
            hidden.flatten(0, 1),
            model.get_output_embeddings().weight,
            inputs["labels"].flatten(),
            inputs["targets"].to(hidden.device),
            gamma=GAMMA,
        )
        mean = loss.total / loss.positions
        return (mean, None) if return_outputs else mean


def main(cache, student, to, steps=100):
    arguments = TrainingArguments(
        output_dir=to,
        max_steps=int(steps),
        learning_rate=3e-4,
        weight_decay=0.1,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
    )
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    trainer = DistillTrainer(model=model, args=arguments, train_dataset=ddk_pipe.CachedWindows(cache))
    print(f"loss {trainer.train().training_loss:.3f}")
    trainer.save_model(to)
    AutoTokenizer.from_pretrained(student).save_pretrained(to)


if __name__ == "__main__":
    main(*sys.argv[1:])
