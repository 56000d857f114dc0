"""The table only: publication, slot and the rest of the relay's are made by `cdc-outbox migrate up`."""

from django.db import migrations

from cdc_outbox.outbox.schema import sql
from cdc_outbox.transactions.django_migration import RunPostgresSQL


class Migration(migrations.Migration):
    operations = (RunPostgresSQL(sql()),)
