"""The table only: publication, slot and the rest of the relay's are made by `cdc-outbox migrate up`."""

from django.db import migrations

from cdc_outbox.outbox.tables import sql


class Migration(migrations.Migration):
    operations = (migrations.RunSQL(sql(), "DROP TABLE IF EXISTS public.outbox"),)
