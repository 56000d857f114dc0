"""The application, for INSTALLED_APPS: ``"cdc_outbox.inbox.django"``."""

from django.apps import AppConfig


class InboxConfig(AppConfig):
    name = "cdc_outbox.inbox.django"
    label = "cdc_outbox_inbox"
    verbose_name = "cdc-outbox inbox"
