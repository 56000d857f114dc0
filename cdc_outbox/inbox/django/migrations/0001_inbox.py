"""The plain tables. For a partitioned one run ``schema.sql(partitioned=True)`` in a migration of your own instead."""

from django.db import migrations

from cdc_outbox.inbox.schema import sql
from cdc_outbox.transactions.django_migration import RunPostgresSQL


class Migration(migrations.Migration):
    operations = (RunPostgresSQL(sql()),)
