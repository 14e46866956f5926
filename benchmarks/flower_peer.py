"""FedAvg over LoRA factors in Flower, as its FlowerTune LLM recipe has it; an app that flower.py packs for Flower's own
interpreter, so it imports nothing of ours.

The recipe (github.com/adap/flower, `examples/flowertune-llm-*` at fdef7af, version 1.1.2): the server begins with
peft's factors, and every round each client loads the model anew, puts the factors it was sent into it, trains so many
steps with a new Trainer, so with a new AdamW, at one learning rate that falls with the rounds as a cosine, and returns
both factors. The server averages each, weighted by the examples that a client has. The loss is of the answers alone.
Each round's Trainer begins at the same seed, so it draws the same examples again: steps x batch of them in all.

Where this app differs: examples come as tokens and labels, so plain `Trainer` does what TRL's `SFTTrainer` would;
fp32 in place of a base in 4 bits, and no activations are computed again, as Atoll does neither here. With `in_rows` an
example is a row of several conversations, and a round takes the next ones; otherwise it is a conversation, of which a
batch has one to a line, filled up to the longest, as in the recipe.
"""

import json
import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict  # type: ignore[import-not-found]
from flwr.clientapp import ClientApp  # type: ignore[import-not-found]
from flwr.serverapp import ServerApp  # type: ignore[import-not-found]
from flwr.serverapp.strategy import FedAvg  # type: ignore[import-not-found]
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

IGNORED = -100  # the label of a token that is not learned; of any other it is the token itself

client = ClientApp()
server = ServerApp()


def adapted(settings: dict[str, Any]) -> Any:
    """The base with new factors beside it."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(settings["base"], dtype=torch.float32, use_cache=False)
    lora = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=settings["targets"] or None,  # None: what peft has for this type of model
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def learning_rate(round_number: int, settings: dict[str, Any]) -> float:
    """Of a whole round, the first of which is 1."""
    least, most = settings["lr-min"], settings["lr-max"]
    return float(least + (most - least) * (1 + math.cos(math.pi * round_number / settings["rounds"])) / 2)


def padded(conversations: list[Sequence[list[int]]]) -> dict[str, torch.Tensor]:
    """Tokens and labels of some conversations, one to a line, filled up to the longest."""
    lengths = torch.tensor([len(tokens) for tokens, _ in conversations])
    longest = int(lengths.max())

    def filled(which: int, filling: int) -> torch.Tensor:
        return torch.tensor([one[which] + [filling] * (longest - len(one[which])) for one in conversations])

    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": filled(0, 0), "labels": filled(1, IGNORED), "attention_mask": mask}


def stacked(rows: list[Sequence[list[int]]]) -> dict[str, torch.Tensor]:
    """Tokens, labels and positions of some rows. Where positions begin anew, so does a conversation, which sees no
    other one as long as nothing is cached."""
    names = ("input_ids", "labels", "position_ids")
    return {name: torch.tensor([row[which] for row in rows]) for which, name in enumerate(names)}


def arguments(round_number: int, settings: dict[str, Any], scratch: str) -> TrainingArguments:
    """What a round's Trainer is told."""
    return TrainingArguments(
        output_dir=scratch,
        learning_rate=learning_rate(round_number, settings),
        lr_scheduler_type="constant",
        per_device_train_batch_size=settings["batch"],
        max_steps=settings["steps"],
        adam_beta1=settings["beta1"],
        adam_beta2=settings["beta2"],
        weight_decay=settings["weight-decay"],
        max_grad_norm=settings["clip-norm"],
        seed=settings["seed"],
        train_sampling_strategy="sequential" if settings["in-rows"] else "random",
        remove_unused_columns=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


@client.train()
def train(message: Message, context: Context) -> Message:
    """One round of one client."""
    began = time.perf_counter()
    settings, round_number = context.run_config, message.content["config"]["server-round"]
    found = json.loads(Path(context.node_config["data"]).read_text())
    examples, num_examples = found["examples"], found["num-examples"]
    if settings["in-rows"]:
        num_rows = settings["steps"] * settings["batch"]
        examples = examples[(round_number - 1) * num_rows : round_number * num_rows]
    model = adapted(settings)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=arguments(round_number, settings, scratch),
            train_dataset=examples,
            data_collator=stacked if settings["in-rows"] else padded,
        )
        ready = time.perf_counter()
        loss = trainer.train().training_loss
    told = {
        "num-examples": num_examples,
        "loss": loss,
        "training-seconds": time.perf_counter() - ready,
        "seconds": time.perf_counter() - began,
    }
    content = {"arrays": ArrayRecord(get_peft_model_state_dict(model)), "metrics": MetricRecord(told)}
    return Message(content=RecordDict(content), reply_to=message)


class Counted(FedAvg):  # type: ignore[misc]
    """FedAvg that counts bytes of arrays as the recipe does."""

    def __init__(self, num_clients: int) -> None:
        super().__init__(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=num_clients,
            min_available_nodes=num_clients,
        )
        self.bytes_sent, self.bytes_received = 0, 0
        """By all clients."""
        self.rounds: list[list[dict[str, float]]] = []
        """What each client said of each round."""

    def configure_train(self, *given: Any) -> Iterable[Message]:
        messages = list(super().configure_train(*given))
        self.bytes_received += count_bytes(messages)
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        if failed := [reply.error.reason for reply in replies if reply.has_error()]:
            raise RuntimeError(f"a client failed: {failed[0]}")
        self.bytes_sent += count_bytes(replies)
        self.rounds.append([dict(reply.content["metrics"]) for reply in replies])
        return super().aggregate_train(server_round, replies)


def count_bytes(messages: Iterable[Message]) -> int:
    """Of the arrays in some messages."""
    return sum(one.count_bytes() for message in messages for one in message.content.array_records.values())


@server.main()
def main(grid: Any, context: Context) -> None:
    """All rounds; leaves the adapter as a peft directory, and a file `result` beside it."""
    settings = context.run_config
    torch.manual_seed(settings["seed"])
    model = adapted(settings)
    strategy, output = Counted(settings["clients"]), Path(settings["output"])
    begun = ArrayRecord(get_peft_model_state_dict(model))
    began = time.perf_counter()
    result = strategy.start(grid, initial_arrays=begun, num_rounds=settings["rounds"])
    seconds = time.perf_counter() - began
    set_peft_model_state_dict(model, result.arrays.to_torch_state_dict())
    model.save_pretrained(output / "adapter")
    told = {
        "bytes_sent": strategy.bytes_sent,
        "bytes_received": strategy.bytes_received,
        "seconds": seconds,
        "rounds": strategy.rounds,
    }
    (output / "result.part").write_text(json.dumps(told))
    (output / "result.part").replace(output / "result")
