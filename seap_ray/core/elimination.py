"""Elimination: an inverse covariance and a weight in; units go step by step, and what is left stays least squares.

The inverse H = (C + R)^-1 is never changed. Columns that have gone are the rows of a Cholesky factor F of H, in the
order in which they went: what is left of H is H - F^T F. Of that only the rows of the columns that go next, and the
blocks of units on the diagonal, are computed: half the work of a subtraction from all of H in every step, and none of
its copies. The weight changes in place.

Letters: O output features, D columns of the site, S columns that are stored, U units of B columns each, K columns that
have gone, G columns that go in one step.
"""

import torch
from torch import Tensor

LEFT_OF_STORED = 7 / 8
"""Share of the stored columns below which those that are left are copied, and the others forgotten."""


class Elimination:
    """A site on its way from all of its units to none."""

    def __init__(self, inverse_DD: Tensor, weight_OD: Tensor, *, block: int, at_a_time: int) -> None:
        """Begin with all units.

        Args:
            inverse_DD: (C + R)^-1, symmetric and positive definite, (D, D).
            weight_OD: The unpruned weight, (O, D); it is computed with in the inverse's dtype.
            block: Columns of a unit, B.
            at_a_time: Units that go in one step.
        """
        width = len(inverse_DD)
        self._inverse_DD = inverse_DD
        self._block = block
        self._at_a_time = at_a_time
        self._columns_S = torch.arange(width, device=inverse_DD.device)
        self._is_left_U = torch.ones(width // block, dtype=torch.bool, device=inverse_DD.device)

        # Transposed, so that the weights of a column lie together.
        self._weight_SO = weight_OD.to(inverse_DD).T.clone(memory_format=torch.contiguous_format)
        self._inverse_UBB = _diagonal_blocks(inverse_DD, block)
        self._n_gone = 0
        self._factor_SK = inverse_DD.new_empty(width, self._room())

    @property
    def n_left(self) -> int:
        """Number of units that have not gone."""
        return int(self._is_left_U.sum())

    def cheapest(self) -> tuple[Tensor, Tensor]:
        """Return the places of the stored units that go next, and the error that each would add if it went alone.

        That is tr(W_B (H_BB)^-1 W_B^T), with the H and the W that are left. Of equal units the first goes first.
        """
        left_U = self._is_left_U.nonzero()[:, 0]
        products_UBB = _outer_products(self._weight_SO, self._block).index_select(0, left_U)
        inverse_UBB = self._inverse_UBB.index_select(0, left_U)

        # A single column needs no solver, and there are many of them.
        if self._block == 1:
            error_U = (products_UBB / inverse_UBB)[:, 0, 0]
        else:
            error_U = torch.linalg.solve(inverse_UBB, products_UBB).diagonal(dim1=1, dim2=2).sum(1)

        errors, order = torch.sort(error_U, stable=True)
        return left_U[order[: self._at_a_time]], errors[: self._at_a_time]

    def columns(self, places_U: Tensor) -> Tensor:
        """Return the columns of units, as numbers in the whole site, (G,)."""
        return self._columns_S[self._stored_columns(places_U)]

    def remove(self, places_U: Tensor) -> Tensor:
        """Take units out, and return whose squares each of their columns adds to the error after those before it.

        Args:
            places_U: Where the units are stored, as ``cheapest`` returns them.

        Returns:
            Their part in every output, (G, O). All squares together are those of W (C + R) W^T, output by output.
        """
        gone_G = self._stored_columns(places_U)
        n_gone = self._n_gone + len(gone_G)
        factor_SK = self._factor_SK[:, : self._n_gone]

        # The rows of what is left of H.
        row_GD = self._inverse_DD.index_select(0, self._columns_S[gone_G])
        row_GS = row_GD.index_select(1, self._columns_S)
        row_GS.addmm_(factor_SK.index_select(0, gone_G), factor_SK.T, alpha=-1)

        root_GG = torch.linalg.cholesky(row_GS[:, gone_G])
        added_GS = torch.linalg.solve_triangular(root_GG, row_GS, upper=False)
        gone_GO = self._weight_SO.index_select(0, gone_G)
        error_GO = torch.linalg.solve_triangular(root_GG, gone_GO, upper=False)
        self._weight_SO.addmm_(added_GS.T, error_GO, alpha=-1)
        self._inverse_UBB -= _outer_products(added_GS.T, self._block)

        self._factor_SK[:, self._n_gone : n_gone] = added_GS.T
        self._n_gone = n_gone
        self._is_left_U[places_U] = False
        if self.n_left < LEFT_OF_STORED * len(self._is_left_U):
            self._forget_gone()
        return error_GO

    def _forget_gone(self) -> None:
        """Copy what is left, so that products are no larger than they must be."""
        left_S = self._stored_columns(self._is_left_U.nonzero()[:, 0])
        self._inverse_UBB = self._inverse_UBB[self._is_left_U]
        self._is_left_U = self._is_left_U[self._is_left_U]
        self._columns_S = self._columns_S[left_S]
        self._weight_SO = self._weight_SO.index_select(0, left_S)

        factor_SK = self._factor_SK[:, : self._n_gone]
        self._factor_SK = factor_SK.new_empty(len(left_S), self._n_gone + self._room())
        self._factor_SK[:, : self._n_gone] = factor_SK.index_select(0, left_S)

    def _room(self) -> int:
        """Return the most columns that go before the rest is copied the next time."""
        n_stored = len(self._is_left_U)
        return (n_stored - int(LEFT_OF_STORED * n_stored) + self._at_a_time) * self._block

    def _stored_columns(self, places_U: Tensor) -> Tensor:
        """Return where the columns of units are stored."""
        within_B = torch.arange(self._block, device=places_U.device)
        return (places_U[:, None] * self._block + within_B).flatten()


def _diagonal_blocks(matrix_DD: Tensor, block: int) -> Tensor:
    """Return a copy of the blocks on a matrix's diagonal, (U, B, B)."""
    blocks_UBUB = matrix_DD.unflatten(1, (-1, block)).unflatten(0, (-1, block))
    return blocks_UBUB.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone(memory_format=torch.contiguous_format)


def _outer_products(rows_SN: Tensor, block: int) -> Tensor:
    """Return X X^T of every unit's rows X, (U, B, B)."""
    # Thousands of products of a row with itself would each be a call.
    if block == 1:
        return torch.linalg.vector_norm(rows_SN, dim=1).square()[:, None, None]
    rows_UBN = rows_SN.unflatten(0, (-1, block))
    return rows_UBN @ rows_UBN.mT
