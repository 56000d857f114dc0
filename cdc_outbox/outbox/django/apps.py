"""The application, for INSTALLED_APPS: ``"cdc_outbox.outbox.django"``. Its migration makes the table."""

from django.apps import AppConfig


class OutboxConfig(AppConfig):
    name = "cdc_outbox.outbox.django"
    label = "cdc_outbox_outbox"
    verbose_name = "cdc-outbox outbox"
