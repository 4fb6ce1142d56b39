"""Datasets and collators in the manner of widely used fine-tuning scripts: rows are tensors, eager or lazy.

The forms are those of Stanford Alpaca, FastChat and LLaVA; the code is not.
"""

import torch
from tiny import make_rows
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

PAD = 0
LENGTH = 16


def _ids(texts):
    return [torch.tensor(row["input_ids"]) for row in make_rows(texts)]


def _after_prompt(ids):
    """The first three tokens are the instruction, without loss."""
    labels = ids.clone()
    labels[:3] = -100
    return labels


class SupervisedRows(Dataset):
    """As Alpaca's `SupervisedDataset`: all rows are tokenized beforehand, each as long as its text."""

    def __init__(self, texts):
        self.input_ids = _ids(texts)
        self.labels = [_after_prompt(ids) for ids in self.input_ids]

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, index):
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}


def collate_supervised(instances):
    """As Alpaca's `DataCollatorForSupervisedDataset`: `pad_sequence` takes tensors alone."""
    input_ids, labels = ([instance[name] for instance in instances] for name in ("input_ids", "labels"))
    input_ids = pad_sequence(input_ids, batch_first=True, padding_value=PAD)
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    return {"input_ids": input_ids, "labels": labels, "attention_mask": input_ids.ne(PAD)}


class LazyRows(Dataset):
    """As FastChat's `LazySupervisedDataset`: made and padded when they are read; the mask is boolean."""

    def __init__(self, texts):
        self.texts = texts
        self.cached = {}

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        if index not in self.cached:
            (ids,) = _ids([self.texts[index]])
            padded = torch.full((LENGTH,), PAD)
            padded[: len(ids)] = ids
            labels = torch.where(padded == PAD, -100, _after_prompt(padded))
            self.cached[index] = {
                "input_ids": padded,
                "labels": labels,
                "attention_mask": padded.ne(PAD),
            }
        return self.cached[index]


class RowsWithImages(Dataset):
    """As LLaVA's `LazySupervisedDataset`: every other row has an image, and samplers ask for lengths."""

    def __init__(self, texts):
        self.input_ids = _ids(texts)

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, index):
        ids = self.input_ids[index]
        row = {"input_ids": ids, "labels": _after_prompt(ids)}
        return row | ({"image": torch.full((3, 4, 4), float(index))} if index % 2 else {})

    @property
    def modality_lengths(self):
        return [len(ids) if i % 2 else -len(ids) for i, ids in enumerate(self.input_ids)]


def collate_with_images(instances):
    batch = collate_supervised(instances)
    nothing = torch.zeros(3, 4, 4)
    return batch | {"images": torch.stack([instance.get("image", nothing) for instance in instances])}
