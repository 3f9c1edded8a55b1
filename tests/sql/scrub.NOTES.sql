with scrubbed as (
    update "public".outbox_discarded as discarded
    set reason = 'forgotten'
    where discarded.backend_id = any (array(select backend_id from "public".outbox_secondary))
      and discarded.key_hash = hashtextextended(
          cast($1 as text) || '/' || cast($2 as text) || '/' || cast($3 as text), 0
      )
      and discarded.tenant_id = $1 and discarded.resource_type = $2
      and discarded.resource_id = $3 and discarded.reason <> 'forgotten'
    returning discarded.backend_id
)
select count(*) from scrubbed
