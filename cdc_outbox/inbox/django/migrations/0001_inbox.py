"""The plain table. For a partitioned one run ``tables.sql(partitioned=True)`` in a migration of your own instead."""

from django.db import migrations

from cdc_outbox.inbox.tables import sql


class Migration(migrations.Migration):
    operations = (migrations.RunSQL(sql(), "DROP TABLE IF EXISTS public.inbox"),)
