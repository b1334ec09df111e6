"""A method file in somebody else's loop: TriAdaptLoRA in Hugging Face's Trainer. Copy triadapt.py beside this file.

    python examples/trainer.py --out out/trainer               # a tiny random model learns in half a minute
    python examples/trainer.py --out out/trainer --resume      # goes on from the last checkpoint there

What a method needs of a loop is five places, marked 1 to 5 below. Needs transformers and accelerate. The
checkpoints of the Trainer hold the whole model, grown as it was; `adapter.safetensors` is the adapter alone.
"""

import argparse
import os
import sys

import torch
from transformers import RobertaConfig, RobertaForSequenceClassification, Trainer, TrainerCallback, TrainingArguments, set_seed

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import triadapt

TARGETS = ["query", "key", "value", "dense"]
STEPS = 60


def build():
    """(model, rows): a random RoBERTa for two classes; what the first word is decides."""
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=24, max_position_embeddings=20, **sizes))
    words = torch.randint(4, 24, (256, 15))
    labels = (words[:, 0] >= 14).long()
    return model, [{"input_ids": w, "labels": label} for w, label in zip(words, labels)]


class Grow(TrainerCallback):
    def on_step_end(self, args, state, control, model, optimizer, **others):
        if args.world_size > 1:  # the Trainer wraps the model once, and what grows afterwards would differ by process
            raise ValueError("layers cannot grow under the Trainer in several processes: train in one")
        # 4. After each step of the optimizer. Accelerate wraps it; growth needs the one that holds the moments.
        event = triadapt.after_step(model, getattr(optimizer, "optimizer", optimizer), state.global_step, state.max_steps)
        if event:
            print(f"step {state.global_step}: new ranks {event['grown']}, budget left {event['budget']}")


class AdapterTrainer(Trainer):
    # The Trainer is to divide what compute_loss gives by the accumulated batches. Left alone it does not, for any model
    # whose forward takes **kwargs: the penalty would count once a batch, and so would the loss of a RoBERTa.
    loss_is_scaled_for_ga = False

    def create_optimizer(self, model=None):
        # 2. The method's groups. The Trainer asks after it has loaded a checkpoint: grown matrices are there already.
        if self.optimizer is None:
            groups = triadapt.param_groups(self.model, self.args.learning_rate, self.args.weight_decay)
            self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # 3. The penalty, on the mean loss of this batch: without num_items_in_batch every model gives that.
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if loss.requires_grad:  # no part of eval_loss, by which the best checkpoint is chosen
            loss = loss + triadapt.penalty(model)
        return (loss, outputs) if return_outputs else loss


def trainer_for(model, rows, out, **settings):
    defaults = {
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": STEPS, "learning_rate": 1e-2,
        "save_steps": 10, "logging_steps": 20, "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }  # fmt: skip
    return AdapterTrainer(model, TrainingArguments(out, **defaults | settings), train_dataset=rows, callbacks=[Grow()])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/trainer", help="folder of the checkpoints, the adapter and the merged model")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    args = parser.parse_args(argv)

    model, rows = build()
    # 1. Wrap the layers of the encoder, which freezes all else, and train the head as well.
    triadapt.inject(model.roberta, TARGETS, rank_ref=4, delta=2, interval=8, t0=8, orth=0.01)
    model.classifier.requires_grad_(True)
    trainer_for(model, rows, args.out).train(resume_from_checkpoint=args.resume)

    # 5. The adapter alone, for triadapt.load on the same base; and a plain model for from_pretrained.
    triadapt.save(model, os.path.join(args.out, "adapter.safetensors"))
    ranks = sorted(triadapt.watch(model)["ranks"].values())
    print(f"ranks {ranks}, accuracy on the rows trained on {accuracy(model, rows):.2f}")
    triadapt.merge(model)
    model.save_pretrained(os.path.join(args.out, "merged"))
    print(f"merged: accuracy {accuracy(model, rows):.2f}; adapter.safetensors and merged/ are in {args.out}")


@torch.no_grad()
def accuracy(model, rows):
    model.eval()
    words, labels = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
    return (model(input_ids=words.to(model.device)).logits.argmax(1).cpu() == labels).double().mean().item()


if __name__ == "__main__":
    main()
