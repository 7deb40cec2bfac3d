"""Where every byte of the address space is: claims, the pieces that follow from them, the table of mappings and the ledger."""

from coreheap.accounting.claims import Claims as Claims
from coreheap.accounting.ledger import Account as Account
from coreheap.accounting.ledger import account_for_memory as account_for_memory
from coreheap.accounting.ledger import build_ledger as build_ledger
from coreheap.accounting.ledger import no_account as no_account
