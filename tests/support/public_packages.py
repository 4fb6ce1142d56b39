"""The places whose names anybody may import; everything else is its package's own affair."""

PUBLIC = {
    "ezmia_callbacks",
    "ezmia_callbacks.canaries",
    "ezmia_callbacks.demo",
    "ezmia_callbacks.errors",
    "ezmia_callbacks.functional",
    "ezmia_callbacks.huggingface",
    "ezmia_callbacks.lightning",
    "ezmia_callbacks.post_hoc",
    "ezmia_callbacks.reference",
    "ezmia_callbacks.report",
    "ezmia_callbacks.results",
    "ezmia_callbacks.scoring",
}

# It cannot be installed without a GPU stack; its plugin has tests of its own.
NOT_IMPORTABLE = {"ezmia_callbacks.axolotl": {"PrivacyAuditArgs", "PrivacyAuditPlugin"}}
