"""A complete audited fine-tune on real text, without a network: `ezmia demo`."""
