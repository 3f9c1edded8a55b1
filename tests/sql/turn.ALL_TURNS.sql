select from "public".outbox_secondary as secondary
where cast($1 as text) is null or secondary.backend_id = $1
order by secondary.backend_id
for no key update of secondary
