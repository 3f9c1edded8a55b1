select count(*) as transactions, coalesce(max(statement_timestamp() - prepared), interval '0') as age
from pg_prepared_xacts
