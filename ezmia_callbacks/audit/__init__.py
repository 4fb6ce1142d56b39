"""One audited run, in order: settings, the auditor, the verdict, the run's folder, the kept weights.

May import `measuring`, `reference`, `results` and everything below them; no shell and no framework. The
public name, `PrivacyAuditor`, is imported from `ezmia_callbacks`.
"""

__all__: list[str] = []
